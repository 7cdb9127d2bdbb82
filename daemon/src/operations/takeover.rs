//! A VM that moves to another QEMU with its volume on vhost-user: one attachment takes over from another.
//!
//! The target's QEMU needs a device to describe while the source's still uses it. So the VM gets a second attachment of the same
//! volume: named in the record of the first, with a socket of its own, in the next epoch. Its device starts when the target's
//! machine runs, and then: record replaced and the next epoch durable → no new session of the first → its sessions ended and their
//! requests out of flight (I3) → the second's queues are looked at. A crash before the record: both are as they were; after it:
//! the first has no door at the next start.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use libvol::catalog::{AttachmentRecord, Tx, VmRecord, VolumeRecord};
use libvol::control::{self, Protocol};
use libvol::ids::{AttachmentId, VolumeId, VolumePath};
use libvol::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use super::attach::remove_socket;
use super::volume::holder;
use super::{Operations, volume_named};
use crate::shard::AskTakeover;

/// What else is under way for the volume may keep a starting device waiting for so long; its QEMU stands still meanwhile, and tries again.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// An attachment's device is to start.
pub(crate) struct Claim {
    volume: VolumeId,
    attachment: AttachmentId,
    answer: oneshot::Sender<Result<()>>,
    _only: Only,
}

/// An attachment has one claim at a time.
struct Only(Arc<AtomicBool>);

impl Only {
    fn claim(of: &Arc<AtomicBool>) -> Option<Self> {
        (!of.swap(true, Ordering::AcqRel)).then(|| Self(of.clone()))
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Operations {
    /// A second attachment for the VM that has the volume; asked for again, the same one. The volume's lock is held.
    pub(super) async fn attach_incoming(
        &self,
        volume: VolumeRecord,
        mut attachment: AttachmentRecord,
        vm: VmRecord,
    ) -> Result<control::Attachment> {
        if attachment.protocol != Protocol::VhostUser {
            return Err(Error::invalid(format!(
                "volume {} is attached via nbd, where --incoming is not needed: every QEMU of the VM may connect to the one \
                 attachment (docs/OPERATIONS.md, Live migration)",
                volume.path
            )));
        }
        let is_new = attachment.successor.is_none();
        if is_new {
            attachment.successor = Some(AttachmentId::random());
            self.change(|tx| tx.update(&attachment))?;
        }
        self.serve(&volume, &attachment, &vm).await?;
        if let Err(e) = self.serve_incoming(&volume, &attachment, &vm).await {
            if is_new {
                self.without_successor(&mut attachment)?;
            }
            return Err(e);
        }
        let successor = attachment
            .succeeded()
            .ok_or_else(|| Error::internal("it was just recorded"))?;
        tracing::info!(volume = %volume.path, vm = %vm.name, epoch = %successor.epoch, "another attachment is to take over");
        self.incoming_shown(successor, volume.path, vm).await
    }

    /// The attachment that was to take over ends. The volume's lock is held.
    pub(super) async fn detach_incoming(
        &self,
        volume: VolumeRecord,
        mut attachment: AttachmentRecord,
        vm: &VmRecord,
    ) -> Result<()> {
        let Some(successor) = attachment.succeeded() else {
            return Err(Error::not_found(format!(
                "volume {} has no attachment that is to take over",
                volume.path
            )));
        };
        self.without_successor(&mut attachment)?;
        remove_socket(&self.socket(successor.id));
        let (id, epoch) = (volume.id, attachment.epoch);
        self.shards
            .of_volume(id)
            .call(move |registry| async move {
                registry.close_incoming(id, epoch).await;
                Ok(())
            })
            .await?;
        tracing::info!(volume = %volume.path, vm = %vm.name, "no other attachment is to take over any more");
        Ok(())
    }

    /// Opens the door of the attachment that is to take over, if there is one and it is not open. The volume's lock is held.
    pub(super) async fn serve_incoming(
        &self,
        volume: &VolumeRecord,
        attachment: &AttachmentRecord,
        vm: &VmRecord,
    ) -> Result<()> {
        let report = self.report(volume.id).await?;
        match attachment.succeeded() {
            Some(successor) if report.is_none_or(|report| report.incoming.is_none()) => {
                let takeover = self.ask_takeover(&successor);
                self.open_door(volume, &successor, vm, Some(takeover)).await
            }
            _ => Ok(()),
        }
    }

    fn without_successor(&self, attachment: &mut AttachmentRecord) -> Result<()> {
        attachment.successor = None;
        self.change(|tx| tx.update(attachment))
    }

    /// A successor for people.
    pub(super) async fn incoming_shown(
        &self,
        successor: AttachmentRecord,
        path: VolumePath,
        vm: VmRecord,
    ) -> Result<control::Attachment> {
        let report = self.report(successor.volume).await?;
        Ok(control::Attachment {
            incoming: true,
            connections: report.and_then(|r| r.incoming).unwrap_or(0),
            ..self.attachment_shown(successor, path, vm).await?
        })
    }

    /// How its door asks for the volume.
    fn ask_takeover(&self, successor: &AttachmentRecord) -> AskTakeover {
        let (claims, volume, attachment) = (self.claims.clone(), successor.volume, successor.id);
        let claimed = Arc::default();
        Arc::new(move || {
            let (answer, answered) = oneshot::channel();
            match Only::claim(&claimed) {
                None => {
                    let _ = answer.send(Err(Error::busy("an earlier front-end's attempt is under way")));
                }
                // Where nobody receives any more, nobody answers.
                Some(only) => {
                    let _ = claims.send(Claim {
                        volume,
                        attachment,
                        answer,
                        _only: only,
                    });
                }
            }
            answered
        })
    }

    /// Lets attachments take over, one volume not waiting for another.
    pub(super) fn watch_claims(self: &Arc<Self>, mut claims: mpsc::UnboundedReceiver<Claim>) {
        let operations = self.clone();
        self.in_background(async move {
            while let Some(claim) = claims.recv().await {
                let taking = operations.clone();
                operations.in_background(async move {
                    let taken = taking.take_over(&claim).await;
                    if let Err(e) = &taken {
                        let said = taking.not_taken_over.lock();
                        said.unwrap_or_else(PoisonError::into_inner).say(|times| {
                            tracing::warn!(volume = %claim.volume, times, "an attachment does not take over: {e}");
                        });
                    }
                    // The front-end may have gone meanwhile.
                    let _ = claim.answer.send(taken);
                });
            }
        });
    }

    async fn take_over(&self, claim: &Claim) -> Result<()> {
        let (id, attachment) = (claim.volume, claim.attachment);
        let lock = tokio::time::timeout(LOCK_WAIT, self.volume_locks.lock(id)).await;
        let _lock = lock.map_err(|_| Error::busy("something else is under way for the volume"))?;
        if claim.answer.is_closed() {
            return Err(Error::unavailable("its front-end has gone"));
        }
        let held = self.look(|view| {
            let volume = view.get::<VolumeRecord>(id)?;
            Ok(volume.zip(holder(view, id)?))
        })?;
        let Some((volume, (current, vm))) = held else {
            return Err(Error::not_found("it was detached meanwhile"));
        };
        let next = match current.succeeded() {
            // It has, as far as the record goes.
            _ if current.id == attachment => current,
            Some(next) if next.id == attachment => {
                self.change(|tx| record_takeover(tx, &volume.path, &current, &next))?;
                remove_socket(&self.socket(current.id));
                next
            }
            _ => return Err(Error::not_found("it was called off meanwhile")),
        };
        let epoch = next.epoch;
        self.shards
            .of_volume(id)
            .call(move |registry| async move { registry.take_over(id, epoch).await })
            .await?;
        tracing::info!(volume = %volume.path, vm = %vm.name, %epoch, "taken over by the VM's other attachment");
        self.audit.did(
            "volume.taken_over",
            volume.path.to_string(),
            format!("VM {}, epoch {epoch}", vm.name),
        );
        Ok(())
    }
}

/// From here on the next attachment is the volume's.
fn record_takeover(
    tx: &Tx<'_>,
    path: &VolumePath,
    current: &AttachmentRecord,
    next: &AttachmentRecord,
) -> Result<()> {
    let mut volume = volume_named(tx, path)?;
    volume.attachment_epoch = next.epoch;
    tx.update(&volume)?;
    tx.remove::<AttachmentRecord>(current.id)?;
    tx.insert(next)
}

/// What is left of a takeover that fails between its record, which is durable, and the end of the first attachment.
#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use libvol::ids::Epoch;
    use rustix::process::geteuid;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn asked_for(incoming: bool) -> control::Attach {
        control::Attach {
            volume: "acme/web".parse().unwrap(),
            vm: "vm1".parse().unwrap(),
            via: Protocol::VhostUser,
            read_only: false,
            incoming,
        }
    }

    /// A volume that is attached, and is to move.
    struct Moving {
        operations: Arc<Operations>,
        volume: VolumeId,
        /// As they were shown.
        first: control::Attachment,
        second: control::Attachment,
    }

    impl Moving {
        async fn new(dir: &Path) -> Self {
            let operations = Operations::start_in(&dir.join("data"), 1).await.unwrap();
            let store = control::StoreAdd {
                name: "a".parse().unwrap(),
                path: dir.join("a.store").to_str().unwrap().to_owned(),
                size_bytes: Some(64 * MIB),
                zone: None,
                extent_bytes: Some(MIB),
                allow_buffered: true,
            };
            operations.store_add(store).await.unwrap();
            let customer = control::CustomerCreate {
                name: "acme".parse().unwrap(),
            };
            operations.customer_create(customer).await.unwrap();
            let vm = control::VmCreate {
                name: "vm1".parse().unwrap(),
                customer: "acme".parse().unwrap(),
                uid: None,
            };
            operations.vm_create(vm, geteuid().as_raw()).unwrap();
            let volume = control::VolumeCreate {
                volume: "acme/web".parse().unwrap(),
                size_bytes: 8 * MIB,
                replicas: Some(1),
            };
            operations.volume_create(volume).await.unwrap();
            let first = operations.attach(asked_for(false)).await.unwrap();
            let second = operations.attach(asked_for(true)).await.unwrap();
            let path = "acme/web".parse().unwrap();
            let volume = operations.look(|view| volume_named(view, &path)).unwrap().id;
            Self {
                operations,
                volume,
                first,
                second,
            }
        }

        /// The second attachment's device starts.
        async fn second_starts(&self) -> Result<()> {
            let (answer, _asks) = oneshot::channel();
            let claim = Claim {
                volume: self.volume,
                attachment: self.second.attachment_id,
                answer,
                _only: Only::claim(&Arc::default()).unwrap(),
            };
            self.operations.take_over(&claim).await
        }

        /// The record's word: epoch of the volume, and its attachment.
        fn recorded(&self) -> (Epoch, AttachmentId, Epoch) {
            let look = self.operations.look(|view| {
                let volume = view.get::<VolumeRecord>(self.volume)?.unwrap();
                let (attachment, _) = holder(view, self.volume)?.unwrap();
                Ok((volume.attachment_epoch, attachment.id, attachment.epoch))
            });
            look.unwrap()
        }

        fn is_recorded_as_moved(&self) {
            let next = Epoch(self.first.epoch + 1);
            assert_eq!(self.recorded(), (next, self.second.attachment_id, next));
        }

        /// Exactly one attachment is there, of the next epoch, and serves.
        async fn only_the_second_serves(&self) {
            self.is_recorded_as_moved();
            let shown = self.operations.attachment_list().await.unwrap();
            let shown: Vec<_> = shown
                .iter()
                .map(|a| (a.attachment_id, a.epoch, a.incoming))
                .collect();
            assert_eq!(shown, [(self.second.attachment_id, self.first.epoch + 1, false)]);
            let report = self.operations.report(self.volume).await.unwrap().unwrap();
            assert!(report.served && report.incoming.is_none());
            assert!(Device::connect(&self.first.socket).is_err());
            assert!(Device::connect(&self.second.socket).unwrap().answers());
            // It may start.
            self.second_starts().await.unwrap();
        }
    }

    /// A front-end that asks for nothing but what the device can do.
    struct Device(UnixStream);

    impl Device {
        fn connect(socket: &str) -> std::io::Result<Self> {
            UnixStream::connect(socket).map(Self)
        }

        /// Whether it is served (VHOST_USER_GET_FEATURES).
        fn answers(&mut self) -> bool {
            let message: Vec<u8> = [1u32, 1, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
            self.0.write_all(&message).is_ok() && self.0.read_exact(&mut [0; 20]).is_ok()
        }
    }

    async fn started_anew(moving: Moving, dir: &Path) -> Moving {
        moving.operations.stop().await;
        let Moving {
            operations,
            volume,
            first,
            second,
        } = moving;
        // (Its directory is locked until the last has gone.)
        drop(operations);
        Moving {
            operations: Operations::start_in(&dir.join("data"), 1).await.unwrap(),
            volume,
            first,
            second,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_takeover_that_finds_no_second_door_ends_the_first_all_the_same_and_is_made_good() {
        for restart in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let moving = Moving::new(dir.path()).await;
            let mut source = Device::connect(&moving.first.socket).unwrap();
            assert!(source.answers());
            let (id, epoch) = (moving.volume, Epoch(moving.first.epoch));
            let shard = moving.operations.shards.of_volume(id);
            let close = shard.call(move |registry| async move {
                registry.close_incoming(id, epoch).await;
                Ok(())
            });
            close.await.unwrap();

            let refusal = moving.second_starts().await.unwrap_err();
            assert_eq!(refusal.kind(), libvol::Kind::Unavailable, "{refusal}");
            moving.is_recorded_as_moved();
            assert!(!source.answers(), "the first is not the volume's any more");
            assert!(Device::connect(&moving.first.socket).is_err());
            let report = moving.operations.report(id).await.unwrap().unwrap();
            assert!(!report.served && report.connections == 0, "{report:?}");
            // Tried again, it is no other.
            moving.second_starts().await.unwrap_err();
            moving.is_recorded_as_moved();

            let moving = match restart {
                true => started_anew(moving, dir.path()).await,
                false => {
                    let again = moving.operations.attach(asked_for(false)).await.unwrap();
                    assert_eq!(again.attachment_id, moving.second.attachment_id);
                    moving
                }
            };
            moving.only_the_second_serves().await;
            moving.operations.stop().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_takeover_whose_volume_was_closed_meanwhile_is_made_good_by_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let moving = Moving::new(dir.path()).await;
        let mut source = Device::connect(&moving.first.socket).unwrap();
        assert!(source.answers());
        let id = moving.volume;
        let shard = moving.operations.shards.of_volume(id);
        let close = shard.call(move |registry| async move { registry.close(id).await });
        close.await.unwrap();
        moving.second_starts().await.unwrap_err();
        moving.is_recorded_as_moved();
        assert!(!source.answers());
        assert!(moving.operations.report(id).await.unwrap().is_none());
        let moving = started_anew(moving, dir.path()).await;
        moving.only_the_second_serves().await;
        moving.operations.stop().await;
    }

    /// The record alone, as a crash right after it leaves it: the first attachment still stands in this process.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_takeover_that_ended_with_its_record_is_finished_by_the_next_try_or_start() {
        for restart in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let moving = Moving::new(dir.path()).await;
            let mut source = Device::connect(&moving.first.socket).unwrap();
            assert!(source.answers());
            let record = moving.operations.look(|view| holder(view, moving.volume));
            let (current, _) = record.unwrap().unwrap();
            let path: VolumePath = "acme/web".parse().unwrap();
            let next = current.succeeded().unwrap();
            let recorded = moving
                .operations
                .change(|tx| record_takeover(tx, &path, &current, &next));
            recorded.unwrap();
            let moving = match restart {
                true => started_anew(moving, dir.path()).await,
                false => {
                    moving.second_starts().await.unwrap();
                    moving
                }
            };
            assert!(!source.answers());
            moving.only_the_second_serves().await;
            moving.operations.stop().await;
        }
    }
}
