//! `volctl attach`, `detach` and `attachment list`: which volume is given to which VM, and how to reach it.

use clap::{Args, Subcommand, ValueEnum};
use libvol::control::{Attach, Attachment, Detach, Done, List, Protocol};
use libvol::ids::{Name, VolumePath};

use crate::Session;
use crate::failure::{Failure, one_line};
use crate::render::{Column, Human, Row, facts, word};

/// What to do with attachments.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All attachments
    List,
}

/// Arguments of `attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The volume
    #[arg(value_name = "CUSTOMER/NAME")]
    volume: VolumePath,
    /// The VM, of the same customer
    #[arg(long, value_name = "VM")]
    vm: Name,
    /// Data protocol
    #[arg(long, value_enum, default_value_t = Via::Nbd)]
    via: Via,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// For the QEMU that the running VM migrates to: a second attachment, which takes over when its device starts
    #[arg(long)]
    incoming: bool,
}

/// Arguments of `detach`.
#[derive(Debug, Args)]
pub(crate) struct DetachArgs {
    /// The volume
    #[arg(value_name = "CUSTOMER/NAME")]
    volume: VolumePath,
    /// The VM it is attached to
    #[arg(long, value_name = "VM")]
    vm: Name,
    /// Only the attachment that was to take over: the VM stays where it is
    #[arg(long)]
    incoming: bool,
}

/// Data protocols, as the command line spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Via {
    /// NBD over a Unix socket
    Nbd,
    /// vhost-user-blk: a device whose rings are in the guest's memory
    VhostUser,
}

/// Carries out `attachment`.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::List => session.show(&session.client.get::<List<Attachment>>("/v1/attachments").await?),
    }
}

/// Carries out `attach`.
pub(crate) async fn attach(session: &Session, args: AttachArgs) -> Result<(), Failure> {
    let body = Attach {
        volume: args.volume,
        vm: args.vm,
        via: match args.via {
            Via::Nbd => Protocol::Nbd,
            Via::VhostUser => Protocol::VhostUser,
        },
        read_only: args.read_only,
        incoming: args.incoming,
    };
    session.show(
        &session
            .client
            .post::<Attachment>("/v1/attachments", &body)
            .await?,
    )
}

/// Carries out `detach`.
pub(crate) async fn detach(session: &Session, args: DetachArgs) -> Result<(), Failure> {
    let body = Detach {
        volume: args.volume,
        vm: args.vm,
        incoming: args.incoming,
    };
    let done: Done = session.client.post("/v1/detach", &body).await?;
    let what = match body.incoming {
        false => format!("volume \"{}\" detached from VM \"{}\"", body.volume, body.vm),
        true => format!(
            "volume \"{}\" stays where VM \"{}\" is; no other attachment is to take over",
            body.volume, body.vm
        ),
    };
    session.done(&done, &what)
}

/// One argument as a POSIX shell reads it back.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

fn quoted_all(arguments: &[String]) -> String {
    let quoted: Vec<String> = arguments.iter().map(|a| quoted(&one_line(a))).collect();
    quoted.join(" ")
}

fn access(read_only: bool) -> String {
    if read_only { "read-only" } else { "read-write" }.into()
}

impl Row for Attachment {
    const COLUMNS: &'static [Column] = &[
        Column::Text("VOLUME"),
        Column::Text("VM"),
        Column::Text("PROTOCOL"),
        Column::Text("ACCESS"),
        Column::Number("CONNECTIONS"),
        Column::Text("SOCKET"),
    ];
    const NONE: &'static str = "nothing is attached; attach a volume: volctl attach CUSTOMER/NAME --vm VM";

    fn cells(&self) -> Vec<String> {
        vec![
            self.volume.to_string(),
            self.vm.to_string(),
            word(&self.protocol),
            access(self.read_only) + if self.incoming { ", incoming" } else { "" },
            self.connections.to_string(),
            self.socket.clone(),
        ]
    }
}

impl Human for Attachment {
    fn human(&self) -> String {
        let mut shown = vec![
            ("Volume", Some(self.volume.to_string())),
            ("VM", Some(self.vm.to_string())),
            ("Attachment", Some(self.attachment_id.to_string())),
            ("Epoch", Some(self.epoch.to_string())),
            ("Protocol", Some(word(&self.protocol))),
            ("Access", Some(access(self.read_only))),
            (
                "Incoming",
                self.incoming
                    .then(|| "takes over from the VM's other attachment when its device starts".into()),
            ),
            ("URI", self.uri.clone()),
            ("Socket", Some(self.socket.clone())),
            ("QEMU", Some(quoted_all(&self.qemu_args))),
        ];
        if !self.qemu_memory_args.is_empty() {
            shown.push(("QEMU memory", Some(quoted_all(&self.qemu_memory_args))));
        }
        for access in &self.over_tls {
            shown.push(("Over TLS", Some(access.uri.clone())));
            shown.push(("QEMU over TLS", Some(quoted_all(&access.qemu_args))));
        }
        facts(&shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::ids::AttachmentId;

    fn attachment() -> Attachment {
        Attachment {
            attachment_id: AttachmentId::NIL,
            volume: "acme/web".parse().unwrap(),
            vm: "vm1".parse().unwrap(),
            epoch: 2,
            protocol: Protocol::Nbd,
            read_only: false,
            uri: Some("nbd+unix:///acme/web?socket=/run/v/a.sock".into()),
            socket: "/run/v/a.sock".into(),
            qemu_args: vec![
                "-blockdev".into(),
                r#"{"driver":"nbd"}"#.into(),
                "-device".into(),
                "virtio-blk-pci,drive=a".into(),
            ],
            qemu_memory_args: Vec::new(),
            over_tls: Vec::new(),
            connections: 0,
            incoming: false,
        }
    }

    #[test]
    fn an_attachment_shows_its_uri_and_qemu_arguments_that_a_shell_reads_back() {
        let text = attachment().human();
        assert!(
            text.contains("URI         nbd+unix:///acme/web?socket=/run/v/a.sock\n"),
            "{text}"
        );
        let qemu = r#"QEMU        -blockdev '{"driver":"nbd"}' -device virtio-blk-pci,drive=a"#;
        assert!(text.ends_with(qemu), "{text}");
    }

    #[test]
    fn a_vhost_user_attachment_shows_its_socket_and_what_the_machine_needs_besides() {
        let shown = Attachment {
            protocol: Protocol::VhostUser,
            uri: None,
            qemu_memory_args: vec!["-object".into(), "memory-backend-memfd,share=on".into()],
            ..attachment()
        };
        let text = shown.human();
        assert!(text.contains("Protocol     vhost-user\n"), "{text}");
        assert!(!text.contains("URI"), "{text}");
        let memory = "QEMU memory  -object memory-backend-memfd,share=on";
        assert!(text.ends_with(memory), "{text}");
    }

    #[test]
    fn quoting_keeps_every_argument_whole() {
        for (argument, shell) in [
            ("a.b", "a.b"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$x", "'$x'"),
        ] {
            assert_eq!(quoted(argument), shell);
        }
    }

    #[test]
    fn json_has_the_field_names_that_programs_rely_on() {
        let json: serde_json::Value = serde_json::from_str(&crate::render::json(&attachment())).unwrap();
        for field in ["attachment_id", "protocol", "uri", "socket", "qemu_args"] {
            assert!(json.get(field).is_some(), "{field}: {json}");
        }
    }
}
