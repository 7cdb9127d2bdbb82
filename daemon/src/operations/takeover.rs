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

use libvol::catalog::{AttachmentRecord, VmRecord, VolumeRecord};
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
                self.change(|tx| {
                    let mut volume = volume_named(tx, &volume.path)?;
                    volume.attachment_epoch = next.epoch;
                    tx.update(&volume)?;
                    tx.remove::<AttachmentRecord>(current.id)?;
                    tx.insert(&next)
                })?;
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
