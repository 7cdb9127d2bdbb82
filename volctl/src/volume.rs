//! `volctl volume`: encrypted, replicated disks.

use clap::Subcommand;
use libvol::control::{Destroy, List, Replica, Volume, VolumeCreate, VolumeResize};
use libvol::ids::VolumePath;

use crate::Session;
use crate::args::Format;
use crate::failure::Failure;
use crate::render::{self, Column, Human, Row, facts, word};
use crate::units::{parse_size, size, time};

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a volume; space is taken as it is written
    Create {
        /// Its full name: CUSTOMER/NAME
        #[arg(value_name = "CUSTOMER/NAME")]
        volume: VolumePath,
        /// Its size, a multiple of 4K up to 64T
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: u64,
        /// Replicas, each in a zone of its own: 1 to 3 (default: 2 where there are two zones, else 1)
        #[arg(long, value_name = "N")]
        replicas: Option<usize>,
    },
    /// All volumes
    List,
    /// One volume with all its facts
    Show {
        /// Its full name
        #[arg(value_name = "CUSTOMER/NAME")]
        volume: VolumePath,
    },
    /// Make a volume larger, attached or not
    Resize {
        /// Its full name
        #[arg(value_name = "CUSTOMER/NAME")]
        volume: VolumePath,
        /// Its new size, a multiple of 4K, not below the present one
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: u64,
    },
    /// Delete a volume for good; needs --now, for this version has no recycle bin
    Delete {
        /// Its full name
        #[arg(value_name = "CUSTOMER/NAME")]
        volume: VolumePath,
        /// Destroy it at once: its keys, then every extent of every replica; nothing brings it back. Required in this version
        #[arg(long)]
        now: bool,
    },
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::Create {
            volume,
            size,
            replicas,
        } => {
            let body = VolumeCreate {
                volume,
                size_bytes: size,
                replicas,
            };
            session.show(&session.client.post::<Volume>("/v1/volumes", &body).await?)
        }
        Command::List => session.show(&session.client.get::<List<Volume>>("/v1/volumes").await?),
        Command::Show { volume } => session.show(&session.client.get::<Volume>(&path_of(&volume)).await?),
        Command::Resize { volume, size } => {
            let path = format!("{}/resize", path_of(&volume));
            session.show(
                &session
                    .client
                    .post::<Volume>(&path, &VolumeResize { size_bytes: size })
                    .await?,
            )
        }
        Command::Delete { volume, now } => {
            let query = if now { "?now=true" } else { "" };
            let destroy: Destroy = session
                .client
                .delete(&format!("{}{query}", path_of(&volume)))
                .await?;
            match session.format {
                Format::Json => session.show(&destroy),
                Format::Table => {
                    let follow = format!("Follow it with: volctl destroy wait {}", destroy.volume_id);
                    render::print(&format!("{}\n\n{follow}", destroy.human()))
                }
            }
        }
    }
}

/// Names are checked before they get here and need no escaping.
fn path_of(volume: &VolumePath) -> String {
    format!("/v1/volumes/{}/{}", volume.customer, volume.name)
}

fn replicas(replicas: &[Replica]) -> String {
    let each: Vec<String> = replicas
        .iter()
        .map(|r| format!("{} {}", r.store, r.state))
        .collect();
    each.join(", ")
}

/// The same at length: why, and how long it will take.
fn replicas_at_length(replicas: &[Replica]) -> String {
    let each = replicas.iter().map(|r| {
        let mut text = format!("{} {}", r.store, r.state);
        if let Some(left) = r.resync_left_bytes {
            text += &format!(", {} left", size(left));
        }
        if let Some(seconds) = r.resync_seconds_left {
            text += &format!(", about {seconds} s");
        }
        match &r.reason {
            Some(reason) => text + &format!(" ({reason})"),
            None => text,
        }
    });
    each.collect::<Vec<_>>().join(", ")
}

impl Row for Volume {
    const COLUMNS: &'static [Column] = &[
        Column::Text("VOLUME"),
        Column::Number("SIZE"),
        Column::Number("ALLOCATED"),
        Column::Text("STATE"),
        Column::Text("ATTACHED TO"),
        Column::Text("REPLICAS"),
    ];
    const NONE: &'static str = "no volumes yet; create one: volctl volume create CUSTOMER/NAME --size SIZE";

    fn cells(&self) -> Vec<String> {
        vec![
            format!("{}/{}", self.customer, self.name),
            size(self.size_bytes),
            size(self.allocated_bytes),
            word(&self.state),
            self.attached_to.as_ref().map_or("-".into(), ToString::to_string),
            replicas(&self.replicas),
        ]
    }
}

impl Human for Volume {
    fn human(&self) -> String {
        let unless_zero = |n: u64| (n > 0).then(|| n.to_string());
        facts(&[
            ("Volume", Some(format!("{}/{}", self.customer, self.name))),
            ("Id", Some(self.id.to_string())),
            (
                "Size",
                Some(format!("{} ({} bytes)", size(self.size_bytes), self.size_bytes)),
            ),
            (
                "Allocated",
                Some(format!("{} on each replica", size(self.allocated_bytes))),
            ),
            ("State", Some(word(&self.state))),
            ("Reason", self.reason.clone()),
            ("Attached to", self.attached_to.as_ref().map(ToString::to_string)),
            ("Epoch", Some(self.epoch.to_string())),
            ("Replicas", Some(replicas_at_length(&self.replicas))),
            ("Healed blocks", unless_zero(self.healed_blocks)),
            ("Healed checksums", unless_zero(self.healed_areas)),
            ("Unverified blocks", unless_zero(self.unverified_blocks)),
            ("Recovering extents", unless_zero(self.recovering_extents)),
            ("Created", Some(time(self.created_unix_seconds))),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::control::VolumeState;
    use libvol::ids::VolumeId;

    fn volume() -> Volume {
        let replica = |store: &str| Replica {
            store: store.parse().unwrap(),
            state: "in_sync".into(),
            reason: None,
            resync_left_bytes: None,
            resync_seconds_left: None,
        };
        Volume {
            id: VolumeId::NIL,
            name: "web".parse().unwrap(),
            customer: "acme".parse().unwrap(),
            size_bytes: 10 << 30,
            state: VolumeState::Attached,
            reason: None,
            epoch: 3,
            replicas: vec![replica("a"), replica("b")],
            allocated_bytes: 1536 << 20,
            attached_to: Some("vm1".parse().unwrap()),
            healed_blocks: 0,
            healed_areas: 0,
            unverified_blocks: 0,
            recovering_extents: 0,
            created_unix_seconds: 951_782_400,
        }
    }

    #[test]
    fn the_list_lines_up() {
        let expected = "\
VOLUME      SIZE  ALLOCATED  STATE     ATTACHED TO  REPLICAS
acme/web  10 GiB    1.5 GiB  attached  vm1          a in_sync, b in_sync";
        assert_eq!(
            List {
                items: vec![volume()]
            }
            .human(),
            expected
        );
    }

    #[test]
    fn the_facts_of_a_healthy_volume_hold_no_counters_of_trouble() {
        let expected = "\
Volume              acme/web
Id                  00000000-0000-0000-0000-000000000000
Size                10 GiB (10737418240 bytes)
Allocated           1.5 GiB on each replica
State               attached
Attached to         vm1
Epoch               3
Replicas            a in_sync, b in_sync
Created             2000-02-29 00:00:00 UTC";
        assert_eq!(volume().human(), expected);
    }

    #[test]
    fn trouble_is_shown() {
        let mut volume = volume();
        volume.state = VolumeState::Failed;
        volume.reason = Some("store \"b\" is away".into());
        volume.healed_blocks = 7;
        let text = volume.human();
        assert!(
            text.contains("Reason              store \"b\" is away\n"),
            "{text}"
        );
        assert!(text.contains("Healed blocks       7\n"), "{text}");
    }

    #[test]
    fn json_has_the_field_names_that_programs_rely_on() {
        let json: serde_json::Value = serde_json::from_str(&crate::render::json(&volume())).unwrap();
        for field in [
            "id",
            "name",
            "customer",
            "size_bytes",
            "state",
            "epoch",
            "allocated_bytes",
        ] {
            assert!(json.get(field).is_some(), "{field}: {json}");
        }
        assert_eq!(json["replicas"][0]["store"], "a");
        assert_eq!(json["replicas"][0]["state"], "in_sync");
    }
}
