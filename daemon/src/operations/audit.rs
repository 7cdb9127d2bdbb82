//! The audit log: what callers asked for and how it ended, and what the daemon did by itself to keep its promises (healing,
//! replicas in and out of sync, stores that failed, destructions that ended).
//!
//! A call is written down when it has ended, before its answer. A line that cannot be written stops nothing: an operator at a
//! full disk must be able to act. It is logged, and `status` warns until a line could be written again.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libvol::Result;
use libvol::audit::{Event, Log};
use libvol::catalog::{Catalog, StoreRecord, VolumeRecord};
use libvol::control::{AuditEntry, AuditOutcome, AuditVerified};
use libvol::ids::{StoreId, VolumeId};
use libvol::limits::AUDIT_LIST_MAX;
use libvol::store::Member;
use libvol::volume::Membership;

use super::Operations;
use crate::shard::Mended;

/// How often open volumes are asked what they have healed.
const LOOK: Duration = Duration::from_secs(1);

/// The log, and whether it can be written.
pub(crate) struct Audit {
    log: Log,
    failure: Mutex<Option<String>>,
}

impl Audit {
    pub(crate) fn new(log: Log) -> Self {
        Self {
            log,
            failure: Mutex::default(),
        }
    }

    /// Writes down what a caller asked for.
    pub(crate) fn called<T>(&self, uid: u32, action: &str, subject: String, ended: &Result<T>) {
        let (outcome, detail) = match ended {
            Ok(_) => (AuditOutcome::Done, String::new()),
            Err(e) => (AuditOutcome::Refused, e.to_string()),
        };
        self.write(Event {
            actor: format!("uid {uid}"),
            action: action.into(),
            subject,
            outcome,
            detail,
        });
    }

    /// Writes down what the daemon did by itself.
    pub(crate) fn did(&self, action: &str, subject: impl ToString, detail: impl Into<String>) {
        self.write(Event {
            actor: "vold".into(),
            action: action.into(),
            subject: subject.to_string(),
            outcome: AuditOutcome::Done,
            detail: detail.into(),
        });
    }

    fn write(&self, event: Event) {
        let action = event.action.clone();
        let written = self.log.append(event);
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        *failure = written.err().map(|e| {
            tracing::error!(action, "not in the audit log: {e}");
            e.to_string()
        });
    }

    /// A membership that a volume has made durable.
    pub(super) fn membership(&self, catalog: &Catalog, volume: VolumeId, to: &Membership) {
        let Ok((path, stores)) = catalog.read(|view| {
            let path = view.get::<VolumeRecord>(volume)?.map(|record| record.path);
            Ok((path, view.all::<StoreRecord>()?))
        }) else {
            return;
        };
        let name = |id: StoreId| {
            let store = stores.iter().find(|store| store.id == id);
            store.map_or_else(|| id.to_string(), |store| store.name.to_string())
        };
        let members = to.members.iter().filter(|member| member.state != Member::Vacant);
        let standing: Vec<String> = members
            .map(|member| {
                let state = match member.state {
                    Member::InSync => "in sync",
                    Member::Stale => "stale",
                    Member::Resyncing => "resyncing",
                    Member::Vacant => "vacant",
                };
                let reason = member.reason.as_ref().map(|reason| format!(" ({reason})"));
                format!("{} {state}{}", name(member.store), reason.unwrap_or_default())
            })
            .collect();
        let subject = path.map_or_else(|| volume.to_string(), |path| path.to_string());
        self.did(
            "volume.membership",
            subject,
            format!("epoch {}: {}", to.epoch, standing.join(", ")),
        );
    }
}

impl Operations {
    /// Lines of the log: after a number, or the last ones.
    ///
    /// # Errors
    /// The log's.
    pub(crate) fn audit_list(&self, after: Option<u64>, limit: Option<usize>) -> Result<Vec<AuditEntry>> {
        let limit = limit.unwrap_or(AUDIT_LIST_MAX).min(AUDIT_LIST_MAX);
        tokio::task::block_in_place(|| self.audit.log.list(after, limit))
    }

    /// Verifies the whole log.
    ///
    /// # Errors
    /// `Damaged`; the log's.
    pub(crate) fn audit_verify(&self) -> Result<AuditVerified> {
        tokio::task::block_in_place(|| self.audit.log.verify())
    }

    /// Why the last line could not be written, if so.
    pub(super) fn audit_failure(&self) -> Option<String> {
        let failure = self.audit.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The background task that writes down what volumes have healed.
    pub(super) fn watch_healing(self: &Arc<Self>) {
        let operations = self.clone();
        self.in_background(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                operations.note_healing().await;
            }
        });
    }

    /// What volumes have healed since the last look, a line a volume.
    pub(super) async fn note_healing(&self) {
        for shard in self.shards.iter() {
            let mended = shard
                .call(|registry| async move { Ok(registry.take_mended()) })
                .await;
            for (volume, mended) in mended.unwrap_or_default() {
                let record = self.look(|view| view.get::<VolumeRecord>(volume));
                let subject = match record {
                    Ok(Some(record)) => record.path.to_string(),
                    _ => volume.to_string(),
                };
                let Mended {
                    healed_blocks,
                    healed_areas,
                    lost_blocks,
                } = mended;
                let detail = format!(
                    "{healed_blocks} blocks and {healed_areas} checksum areas healed, {lost_blocks} blocks without a good copy"
                );
                self.audit.did("volume.healed", subject, detail);
            }
        }
    }
}
