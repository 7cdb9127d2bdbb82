//! Attachments: a volume given to a VM.
//!
//! Attach: policy → volume open (nobody can reach it yet) → record with the next attachment epoch durable → socket and
//! door → answered. A crash after the record: the next start opens the door; before it: there is nothing to undo.
//!
//! An attachment that is to take over (`--incoming`) stands in the record of the one that has the volume; see [`super::takeover`].
//!
//! Detach: record gone and the next epoch durable → no new session → sessions ended and their requests out of flight
//! (I3) → volume closed → socket removed → answered. A crash after the record: there is no door at the next start.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Once, PoisonError};

use libvol::catalog::{AttachmentRecord, CustomerRecord, VmRecord, VolumeRecord};
use libvol::control::{self, Protocol};
use libvol::ids::{AttachmentId, Epoch, VolumePath};
use libvol::limits::ATTACHMENTS_PER_VM;
use libvol::tenant::{self, AttachFacts, AttachVerdict, AttachmentFacts, VmIdentity};
use libvol::{Error, Kind, Result};

use super::volume::{check_ready, holder};
use super::{Operations, vm_named, volume_named};
use crate::data_dir::{check_own, make_dir};
use crate::leavings::pass_descriptors;
use crate::process::{own_uid, path_error};
use crate::shard::{AskTakeover, DoorSpec, Gate};

/// Seconds QEMU holds a guest's requests while vold restarts, over NBD.
const QEMU_RECONNECT_SECONDS: u32 = 60;
/// How often QEMU looks whether vold is back, over vhost-user. It holds a guest's requests for as long as it takes.
const QEMU_RECONNECT_MS: u32 = 1000;

impl Operations {
    /// Gives a volume to a VM; attaching again to the same VM gives the same attachment.
    ///
    /// # Errors
    /// `NotFound`, `Refused` (a VM of another customer), `Busy` (another VM of the customer has it), `Unavailable`, `Io`.
    pub(crate) async fn attach(&self, request: control::Attach) -> Result<control::Attachment> {
        let path = &request.volume;
        let (_lock, volume) = self.lock_volume(path).await?;
        check_ready(&volume)?;
        let (vm, held) = self.look(|view| Ok((vm_named(view, &request.vm)?, holder(view, volume.id)?)))?;
        let attachments = self.look(|view| view.all::<AttachmentRecord>())?;
        let facts = AttachFacts {
            volume_customer: volume.customer,
            vm_customer: vm.customer,
            vm: vm.id,
            attached_to: held.as_ref().map(|(_, vm)| vm.id),
            vm_attachments: attachments.iter().filter(|a| a.vm == vm.id).count(),
            vm_attachments_max: ATTACHMENTS_PER_VM,
        };
        match (tenant::may_attach(&facts), held) {
            (AttachVerdict::Foreign, _) => Err(Error::refused(format!(
                "VM {:?} is not of customer {:?}, whose volume {path} is; a volume goes only to its own customer's VMs",
                vm.name.as_str(),
                path.customer.as_str()
            ))),
            (AttachVerdict::HeldBy(_), Some((_, holder))) => Err(Error::busy(format!(
                "volume {path} is attached to VM {:?}; detach it first: volctl detach {path} --vm {}",
                holder.name.as_str(),
                holder.name
            ))),
            (AttachVerdict::Full, _) => Err(Error::no_space(format!(
                "VM {:?} has {ATTACHMENTS_PER_VM} volumes, the most one may have",
                vm.name.as_str()
            ))),
            (AttachVerdict::Same, Some((attachment, _))) => {
                if attachment.read_only != request.read_only || attachment.protocol != request.via {
                    return Err(Error::busy(format!(
                        "volume {path} is attached to VM {:?} {}, and {} was asked for; detach it first to change that",
                        vm.name.as_str(),
                        manner(attachment.protocol, attachment.read_only),
                        manner(request.via, request.read_only),
                    )));
                }
                if request.incoming {
                    return self.attach_incoming(volume, attachment, vm).await;
                }
                self.serve(&volume, &attachment, &vm).await?;
                self.attachment_shown(attachment, volume.path, vm).await
            }
            (AttachVerdict::Attach, None) if request.incoming => Err(Error::not_found(format!(
                "volume {path} is not attached to VM {:?}, so there is nothing to take over; attach it without --incoming",
                vm.name.as_str()
            ))),
            (AttachVerdict::Attach, None) => self.attach_anew(volume, vm, &request).await,
            (verdict, held) => Err(Error::internal(format!("{verdict:?} with {}", held.is_some()))),
        }
    }

    async fn attach_anew(
        &self,
        volume: VolumeRecord,
        vm: VmRecord,
        request: &control::Attach,
    ) -> Result<control::Attachment> {
        let id = AttachmentId::random();
        warn_if_unreachable(&self.dirs.attachment_socket(id), &vm);
        self.open_volume(&volume).await?;
        let recorded = self.change(|tx| {
            let mut volume = volume_named(tx, &volume.path)?;
            volume.attachment_epoch = Epoch(volume.attachment_epoch.0 + 1);
            let attachment = AttachmentRecord {
                id,
                volume: volume.id,
                vm: vm.id,
                customer: vm.customer,
                epoch: volume.attachment_epoch,
                protocol: request.via,
                read_only: request.read_only,
                successor: None,
                moved: false,
            };
            // The VM may have been removed since it was looked up; its record is part of this transaction's view.
            if tx.get::<VmRecord>(vm.id)?.is_none() {
                return Err(Error::not_found(format!(
                    "VM {:?} was removed meanwhile",
                    vm.name.as_str()
                )));
            }
            tx.update(&volume)?;
            tx.insert(&attachment)?;
            Ok(attachment)
        });
        let attachment = match recorded {
            Ok(attachment) => attachment,
            Err(e) => {
                self.close_volume(&volume).await;
                return Err(e);
            }
        };
        // Who has come there meanwhile was not this attachment's.
        self.passed.turn_away_waiting(&volume.path);
        if let Err(e) = self.serve(&volume, &attachment, &vm).await {
            // Nobody was let in: take it back.
            self.unrecord(&volume, &attachment)?;
            self.close_volume(&volume).await;
            return Err(e);
        }
        tracing::info!(volume = %volume.path, vm = %vm.name, epoch = %attachment.epoch, "attached");
        self.attachment_shown(attachment, volume.path, vm).await
    }

    /// Opens the volume and the attachment's door, unless they are open. The volume's lock is held.
    pub(super) async fn serve(
        &self,
        volume: &VolumeRecord,
        attachment: &AttachmentRecord,
        vm: &VmRecord,
    ) -> Result<()> {
        if self.report(volume.id).await?.is_some_and(|report| report.served) {
            return Ok(());
        }
        self.open_volume(volume).await?;
        self.open_door(volume, attachment, vm, None).await
    }

    /// Opens a door; that of an attachment that is to take over asks for it there.
    pub(super) async fn open_door(
        &self,
        volume: &VolumeRecord,
        attachment: &AttachmentRecord,
        vm: &VmRecord,
        takeover: Option<AskTakeover>,
    ) -> Result<()> {
        let socket = self.socket(attachment.id);
        let spec = DoorSpec {
            facts: AttachmentFacts {
                volume: volume.id,
                volume_customer: volume.customer,
                vm_customer: vm.customer,
                vm_uid: vm.uid,
                vm: VmIdentity {
                    customer: volume.path.customer.clone(),
                    vm: vm.name.clone(),
                },
                epoch: attachment.epoch,
            },
            export: volume.path.to_string(),
            vm: vm.name.to_string(),
            protocol: attachment.protocol,
            read_only: attachment.read_only,
            moved: attachment.moved,
            listener: bind(&socket, vm.uid, attachment.protocol)?,
            also: match attachment.moved {
                false => self.passed.of(&volume.path)?,
                // The process that it came from may still go there.
                true => None,
            },
            takeover,
            switchboard: self.shards.switchboard(),
        };
        let opened = self
            .shards
            .of_volume(volume.id)
            .call(move |registry| async move { registry.open_door(spec) })
            .await;
        if opened.is_err() {
            remove_socket(&socket);
        }
        opened
    }

    /// Removes the attachment and raises the volume's attachment epoch, durably. Returns the new epoch.
    fn unrecord(&self, volume: &VolumeRecord, attachment: &AttachmentRecord) -> Result<Epoch> {
        self.change(|tx| {
            let mut volume = volume_named(tx, &volume.path)?;
            volume.attachment_epoch = Epoch(volume.attachment_epoch.0 + 1);
            tx.update(&volume)?;
            tx.remove::<AttachmentRecord>(attachment.id)?;
            Ok(volume.attachment_epoch)
        })
    }

    /// Takes a volume from its VM. When this returns, nothing of the VM is in flight.
    ///
    /// # Errors
    /// `NotFound` (volume, VM, or the volume is not attached to that VM), `Io`.
    pub(crate) async fn detach(&self, request: control::Detach) -> Result<()> {
        let path = &request.volume;
        let (_lock, volume) = self.lock_volume(path).await?;
        let id = volume.id;
        let (vm, held) = self.look(|view| Ok((vm_named(view, &request.vm)?, holder(view, id)?)))?;
        let attachment = match held {
            Some((attachment, holder)) if holder.id == vm.id => attachment,
            _ => {
                return Err(Error::not_found(format!(
                    "volume {path} is not attached to VM {:?}; `volctl volume show {path}` says where it is",
                    vm.name.as_str()
                )));
            }
        };
        if request.incoming {
            return self.detach_incoming(volume, attachment, &vm).await;
        }
        let epoch = self.unrecord(&volume, &attachment)?;
        self.sockets(&attachment)
            .for_each(|socket| remove_socket(&socket));
        self.shards
            .of_volume(id)
            .call(move |registry| async move {
                registry.close_door(id, epoch).await;
                Ok(())
            })
            .await?;
        self.close_volume(&volume).await;
        self.set_failure(id, None);
        tracing::info!(volume = %path, vm = %vm.name, %epoch, "detached");
        Ok(())
    }

    /// All attachments.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) async fn attachment_list(&self) -> Result<Vec<control::Attachment>> {
        let rows = self.look(|view| {
            let mut rows = Vec::new();
            for attachment in view.all::<AttachmentRecord>()? {
                let volume = view.get::<VolumeRecord>(attachment.volume)?;
                let vm = view.get::<VmRecord>(attachment.vm)?;
                if let (Some(volume), Some(vm)) = (volume, vm) {
                    let successor = attachment.succeeded();
                    let both = std::iter::once((attachment, false)).chain(successor.map(|next| (next, true)));
                    rows.extend(both.map(|(attachment, incoming)| {
                        (attachment, volume.path.clone(), vm.clone(), incoming)
                    }));
                }
            }
            Ok(rows)
        })?;
        let mut shown = Vec::with_capacity(rows.len());
        for (attachment, path, vm, incoming) in rows {
            shown.push(match incoming {
                false => self.attachment_shown(attachment, path, vm).await?,
                true => self.incoming_shown(attachment, path, vm).await?,
            });
        }
        shown.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(shown)
    }

    pub(super) async fn attachment_shown(
        &self,
        attachment: AttachmentRecord,
        volume: VolumePath,
        vm: VmRecord,
    ) -> Result<control::Attachment> {
        let connections = self.report(attachment.volume).await?.map_or(0, |r| r.connections);
        let socket = self.socket(attachment.id);
        let socket = socket.to_str().ok_or_else(|| {
            Error::unsupported(format!(
                "{}: the socket's path is not UTF-8; use another --data-dir",
                socket.display()
            ))
        })?;
        let over_nbd = attachment.protocol == Protocol::Nbd;
        let (qemu_args, qemu_memory_args) = match attachment.protocol {
            Protocol::Nbd => (
                qemu_args(&volume, attachment.id, socket, attachment.read_only),
                Vec::new(),
            ),
            Protocol::VhostUser => (qemu_vhost_user_args(attachment.id, socket), qemu_memory_args()),
        };
        Ok(control::Attachment {
            attachment_id: attachment.id,
            uri: over_nbd.then(|| uri(&volume, socket)),
            qemu_args,
            qemu_memory_args,
            over_tls: match over_nbd {
                true => self.over_tls(&volume, &attachment),
                false => Vec::new(),
            },
            socket: socket.to_owned(),
            volume,
            vm: vm.name,
            epoch: attachment.epoch.0,
            protocol: attachment.protocol,
            read_only: attachment.read_only,
            connections,
            incoming: false,
        })
    }

    fn over_tls(&self, volume: &VolumePath, attachment: &AttachmentRecord) -> Vec<control::TlsAccess> {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses = gate.iter().flat_map(Gate::addresses);
        addresses
            .map(|address| {
                let host = match address.ip() {
                    ip if ip.is_unspecified() => {
                        rustix::system::uname().nodename().to_string_lossy().into_owned()
                    }
                    ip => ip.to_string(),
                };
                let port = address.port();
                let bracketed = if host.contains(':') {
                    format!("[{host}]")
                } else {
                    host.clone()
                };
                control::TlsAccess {
                    uri: format!("nbds://{bracketed}:{port}/{volume}"),
                    qemu_args: qemu_tls_args(volume, attachment, &host, port),
                }
            })
            .collect()
    }

    /// Where an attachment's socket is.
    pub(super) fn socket(&self, id: AttachmentId) -> PathBuf {
        self.dirs.attachment_socket(id)
    }

    /// Its socket and its successor's.
    pub(super) fn sockets(&self, attachment: &AttachmentRecord) -> impl Iterator<Item = PathBuf> {
        let ids = std::iter::once(attachment.id).chain(attachment.successor);
        ids.map(|id| self.socket(id))
    }

    /// Whose customer a VM is of, for messages at start.
    pub(super) fn customer_of(&self, vm: &VmRecord) -> Result<CustomerRecord> {
        self.look(|view| view.get(vm.customer))?.ok_or_else(|| {
            Error::damaged(format!(
                "VM {:?}: its customer is not in the catalog",
                vm.name.as_str()
            ))
        })
    }
}

/// How a volume is attached, for people.
fn manner(protocol: Protocol, read_only: bool) -> String {
    let protocol = match protocol {
        Protocol::Nbd => "nbd",
        Protocol::VhostUser => "vhost-user",
    };
    let access = if read_only { "read-only" } else { "read-write" };
    format!("{access} via {protocol}")
}

/// A listening socket at `path`, 0600, owned by `uid`. One that an earlier run left is replaced: the data directory's
/// lock says that nobody listens there.
fn bind(path: &Path, uid: u32, protocol: Protocol) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        make_dir(dir, 0o711)?;
        check_own(dir)?;
    }
    remove_socket(path);
    let listener = UnixListener::bind(path).map_err(|e| path_error(path, "the socket cannot be made", e))?;
    if protocol == Protocol::Nbd {
        refuse_descriptors(&listener);
    }
    let given = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).and_then(|()| {
        if uid == own_uid() {
            return Ok(());
        }
        std::os::unix::fs::lchown(path, Some(uid), None)
    });
    if let Err(e) = given {
        remove_socket(path);
        let message = format!(
            "{}: the socket cannot be given to uid {uid}; run vold as root, or give the VM vold's own uid {}",
            path.display(),
            own_uid()
        );
        return Err(Error::with_source(Kind::Refused, message, e));
    }
    Ok(listener)
}

/// NBD knows no descriptors, and letting one go can take as long as its sender likes: a socket's close waits for what it has not
/// sent. So the kernel is to refuse them.
fn refuse_descriptors(listener: &UnixListener) {
    static SAID: Once = Once::new();
    if !pass_descriptors(listener, false) {
        SAID.call_once(|| {
            tracing::warn!(
                "this kernel (before Linux 6.16) cannot refuse descriptors on Unix sockets: a VM's user can hold its shard up by \
                 passing one that takes long to close (docs/SECURITY.md, A hostile NBD client)"
            );
        });
    }
}

/// Removes a socket's file; one that is gone already is as good.
pub(super) fn remove_socket(path: &Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{}: the socket cannot be removed: {e}", path.display());
    }
}

/// Warns when the VM's uid cannot get to its socket for want of search permission on a directory above it.
fn warn_if_unreachable(socket: &Path, vm: &VmRecord) {
    use std::os::unix::fs::MetadataExt;
    if vm.uid == own_uid() {
        return;
    }
    for dir in socket.ancestors().skip(1) {
        let Ok(facts) = std::fs::metadata(dir) else {
            continue;
        };
        // Group membership of the VM's uid is not known here; only what is certain is said.
        let searchable = facts.mode() & 0o011 != 0 || (facts.uid() == vm.uid && facts.mode() & 0o100 != 0);
        if !searchable {
            tracing::warn!(
                vm = %vm.name,
                "{}: uid {} may not pass through this directory to its socket; chmod o+x {}",
                dir.display(),
                vm.uid,
                dir.display()
            );
        }
    }
}

/// `nbd+unix:///EXPORT?socket=PATH`, as the NBD URI specification has it.
fn uri(volume: &VolumePath, socket: &str) -> String {
    // An export's name is made of characters that need no escape in a URI's path.
    format!("nbd+unix:///{volume}?socket={}", percent_encode(socket))
}

/// Escapes what RFC 3986 does not allow plainly in a query's value.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Arguments that give the volume to QEMU. A comma in an option's value is written twice there.
fn qemu_args(volume: &VolumePath, id: AttachmentId, socket: &str, read_only: bool) -> Vec<String> {
    let socket = socket.replace(',', ",,");
    qemu_disk(
        volume,
        id,
        &format!("server.type=unix,server.path={socket}"),
        read_only,
    )
}

/// The same over TLS; the VM's certificate, its key and the CA's certificate lie in QEMU's own directory.
fn qemu_tls_args(volume: &VolumePath, attachment: &AttachmentRecord, host: &str, port: u16) -> Vec<String> {
    let credentials = format!("{}-tls", qemu_node(attachment.id));
    let server = format!("server.type=inet,server.host={host},server.port={port},tls-creds={credentials}");
    let mut args = vec![
        "-object".into(),
        format!("tls-creds-x509,id={credentials},dir=/etc/pki/qemu,endpoint=client,verify-peer=on"),
    ];
    args.extend(qemu_disk(volume, attachment.id, &server, attachment.read_only));
    args
}

/// The node above the connection lets a running machine see that the volume has grown: QEMU learns a size only when it
/// connects, and this node can be given another connection (docs/OPERATIONS.md, Resize).
fn qemu_disk(volume: &VolumePath, id: AttachmentId, server: &str, read_only: bool) -> Vec<String> {
    let node = qemu_node(id);
    let read_only = if read_only { "on" } else { "off" };
    let common = format!("read-only={read_only},cache.direct=on,discard=unmap");
    vec![
        "-blockdev".into(),
        format!(
            "driver=nbd,node-name={node}-nbd,{server},export={volume},\
             reconnect-delay={QEMU_RECONNECT_SECONDS},{common}"
        ),
        "-blockdev".into(),
        format!("driver=raw,node-name={node},file={node}-nbd,{common}"),
        "-device".into(),
        format!("virtio-blk-pci,drive={node},id={node}-disk"),
    ]
}

/// Arguments that give the volume to QEMU as a vhost-user device. It has as many queues as QEMU gives it, and is read-only when
/// the volume is: the device says so.
fn qemu_vhost_user_args(id: AttachmentId, socket: &str) -> Vec<String> {
    let node = qemu_node(id);
    let socket = socket.replace(',', ",,");
    vec![
        "-chardev".into(),
        format!("socket,id={node}-socket,path={socket},reconnect-ms={QEMU_RECONNECT_MS}"),
        "-device".into(),
        format!("vhost-user-blk-pci,chardev={node}-socket,id={node}-disk"),
    ]
}

/// What a machine needs once for all its vhost-user devices: memory that others can map. `SIZE` is what `-m` says.
fn qemu_memory_args() -> Vec<String> {
    vec![
        "-object".into(),
        "memory-backend-memfd,id=vold-memory,size=SIZE,share=on".into(),
        "-machine".into(),
        "memory-backend=vold-memory".into(),
    ]
}

fn qemu_node(id: AttachmentId) -> String {
    format!("vold-{}", &id.0.simple().to_string()[..12])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sockets_path_is_escaped_in_the_uri_and_in_qemus_arguments() {
        let volume = "acme/web".parse().unwrap();
        assert_eq!(
            uri(&volume, "/run/a b/ü&x.sock"),
            "nbd+unix:///acme/web?socket=/run/a%20b/%C3%BC%26x.sock"
        );
        let id = AttachmentId::random();
        let args = qemu_args(&volume, id, "/run/a,b.sock", true);
        assert!(
            args[1].contains("server.path=/run/a,,b.sock,export=acme/web,"),
            "{args:?}"
        );
        assert!(args[1].contains("read-only=on"), "{args:?}");
        let node = |arg: &str| {
            let name = arg.split("node-name=").nth(1).unwrap().split(',').next();
            name.unwrap().to_owned()
        };
        assert!(
            args[3].contains(&format!("file={},read-only=on", node(&args[1]))),
            "{args:?}"
        );
        assert!(
            args[5].contains(&format!("drive={},", node(&args[3]))),
            "{args:?}"
        );
    }

    #[test]
    fn a_vhost_user_device_finds_its_socket_and_is_given_memory_that_others_can_map() {
        let args = qemu_vhost_user_args(AttachmentId::random(), "/run/a,b.sock");
        assert!(args[1].contains(",path=/run/a,,b.sock,reconnect-ms="), "{args:?}");
        let chardev = args[1].split("id=").nth(1).unwrap().split(',').next().unwrap();
        assert!(args[3].contains(&format!("chardev={chardev},")), "{args:?}");
        let memory = qemu_memory_args();
        assert!(memory[1].contains(",share=on"), "{memory:?}");
        let id = memory[1].split("id=").nth(1).unwrap().split(',').next().unwrap();
        assert_eq!(memory[3], format!("memory-backend={id}"));
    }

    #[test]
    fn a_bound_socket_is_private_and_replaces_a_stale_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(bind(&path, own_uid(), Protocol::Nbd).unwrap());
        assert!(path.exists(), "a stale socket");
        let _listener = bind(&path, own_uid(), Protocol::Nbd).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        // Where others may put things, none is made.
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            bind(&open.join("a.sock"), own_uid(), Protocol::Nbd)
                .unwrap_err()
                .kind(),
            Kind::Refused
        );
        assert!(!open.join("a.sock").exists());
    }
}
