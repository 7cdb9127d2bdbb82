//! A VM that moves to another QEMU with its volume on vhost-user: one attachment takes over from another.
//!
//! The target's QEMU needs a device to describe while the source's still uses it. So the VM gets a second attachment of the same
//! volume: named in the record of the first, with a socket of its own, in the next epoch. Its device starts when the target's
//! machine runs, and then: record replaced and the next epoch durable → no new session of the first → its sessions ended and their
//! requests out of flight (I3) → the second's queues are looked at. A crash before the record: both are as they were; after it:
//! the first has no door at the next start.

use std::sync::Arc;

use libvol::catalog::{AttachmentRecord, VmRecord, VolumeRecord};
use libvol::control::{self, Protocol};
use libvol::ids::{AttachmentId, VolumeId, VolumePath};
use libvol::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use super::attach::remove_socket;
use super::volume::holder;
use super::{Operations, volume_named};
use crate::shard::AskTakeover;

/// An attachment's device is to start.
pub(crate) struct Claim {
    volume: VolumeId,
    attachment: AttachmentId,
    answer: oneshot::Sender<Result<()>>,
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
        if let Err(e) = self.serve(&volume, &attachment, &vm).await {
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
        remove_socket(&self.socket(successor.id));
        self.without_successor(&mut attachment)?;
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
    pub(super) fn ask_takeover(&self, successor: &AttachmentRecord) -> AskTakeover {
        let (claims, volume, attachment) = (self.claims.clone(), successor.volume, successor.id);
        Arc::new(move || {
            let (answer, answered) = oneshot::channel();
            // Where nobody receives any more, nobody answers.
            let _ = claims.send(Claim {
                volume,
                attachment,
                answer,
            });
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
                    let taken = taking.take_over(claim.volume, claim.attachment).await;
                    if let Err(e) = &taken {
                        tracing::warn!(volume = %claim.volume, "an attachment does not take over: {e}");
                    }
                    // The front-end may have gone meanwhile.
                    let _ = claim.answer.send(taken);
                });
            }
        });
    }

    async fn take_over(&self, id: VolumeId, attachment: AttachmentId) -> Result<()> {
        let _lock = self.volume_locks.lock(id).await;
        let held = self.look(|view| {
            let volume = view.get::<VolumeRecord>(id)?;
            Ok(volume.zip(holder(view, id)?))
        })?;
        let Some((volume, (current, vm))) = held else {
            return Err(Error::not_found("it was detached meanwhile"));
        };
        if current.id == attachment {
            return Ok(());
        }
        let next = match current.succeeded() {
            Some(next) if next.id == attachment => next,
            _ => return Err(Error::not_found("it was called off meanwhile")),
        };
        self.change(|tx| {
            let mut volume = volume_named(tx, &volume.path)?;
            volume.attachment_epoch = next.epoch;
            tx.update(&volume)?;
            tx.remove::<AttachmentRecord>(current.id)?;
            tx.insert(&next)
        })?;
        remove_socket(&self.socket(current.id));
        let also = self.passed_door(&volume, next.protocol)?;
        self.shards
            .of_volume(id)
            .call(move |registry| async move { registry.take_over(id, also).await })
            .await?;
        tracing::info!(volume = %volume.path, vm = %vm.name, epoch = %next.epoch, "taken over by the VM's other attachment");
        self.audit.did(
            "volume.taken_over",
            &volume.path.to_string(),
            format!("VM {}, epoch {}", vm.name, next.epoch),
        );
        Ok(())
    }
}
