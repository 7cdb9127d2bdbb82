//! The daemon at a glance.

use std::sync::PoisonError;

use libvol::Result;
use libvol::catalog::{
    AttachmentRecord, CustomerRecord, DestroyRecord, Phase, ScrubRecord, VmRecord, VolumeRecord,
};
use libvol::control::{self, StoreState};
use libvol::store::{Severity, StoreHandle};

use super::{Operations, Seat};
use crate::shard::{Gate, Load};

impl Operations {
    /// Version and engine.
    pub(crate) fn version(&self) -> control::Version {
        control::Version {
            version: env!("CARGO_PKG_VERSION").into(),
            store_format: libvol::store::FORMAT_VERSION,
            io_engine: self.shards.engine().into(),
        }
    }

    /// Stores whose metadata was damaged when they were opened, a line each.
    fn damaged_stores(&self) -> Vec<String> {
        let damage = |handle: &StoreHandle| {
            let findings = handle.findings().iter();
            findings
                .filter(|finding| finding.severity == Severity::Damage)
                .count()
        };
        self.seats()
            .iter()
            .filter_map(|(_, seat)| match seat {
                Seat::Open(handle) => Some((handle, damage(handle))),
                Seat::Closed(_) => None,
            })
            .filter(|(_, damaged)| *damaged > 0)
            .map(|(handle, damaged)| {
                format!(
                    "store {:?}: {damaged} findings of damage when it was opened; the log has them, and `vold check` looks closer",
                    handle.info().name.as_str()
                )
            })
            .collect()
    }

    /// A line for each replica of a volume that is out of sync.
    async fn replica_warnings(&self, volume: &VolumeRecord) -> Result<Vec<String>> {
        let shown = self.volume_show(&volume.path).await?;
        let out = shown
            .replicas
            .into_iter()
            .filter(|replica| replica.state != "in_sync");
        let line = |replica: control::Replica| {
            let left = replica.resync_left_bytes.map(|bytes| {
                let seconds = replica.resync_seconds_left;
                let time = seconds.map_or_else(String::new, |seconds| format!(", about {seconds} s"));
                format!(" ({} MiB left{time})", bytes >> 20)
            });
            format!(
                "volume {}: its replica on store {:?} is {}{}{}",
                volume.path,
                replica.store.as_str(),
                replica.state.replace('_', " "),
                left.unwrap_or_default(),
                replica
                    .reason
                    .map_or_else(String::new, |reason| format!(": {reason}"))
            )
        };
        Ok(out.map(line).collect())
    }

    /// What all threads of the data plane carry.
    async fn load(&self) -> Result<Load> {
        let gate = {
            let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
            gate.as_ref().map(Gate::load)
        };
        let mut load = match gate {
            Some(gate) => gate.await?,
            None => Load::default(),
        };
        for shard in self.shards.iter() {
            load += shard.load().await?;
        }
        Ok(load)
    }

    /// How many stores there are.
    pub(crate) fn store_count(&self) -> usize {
        self.seats().len()
    }

    /// Counts, stores, and what needs an operator.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) async fn status(&self) -> Result<control::Status> {
        let stores = self.store_list()?;
        let (customers, vms, volumes, attachments, destroys) = self.look(|view| {
            Ok((
                view.count::<CustomerRecord>()?,
                view.count::<VmRecord>()?,
                view.all::<VolumeRecord>()?,
                view.count::<AttachmentRecord>()?,
                view.all::<DestroyRecord>()?,
            ))
        })?;
        let mut warnings = Vec::new();
        if let Some(failure) = self.audit_failure() {
            warnings.push(format!("the audit log cannot be written: {failure}"));
        }
        for store in &stores {
            let reason = store.reason.as_deref().unwrap_or("no reason known");
            match store.state {
                StoreState::Online => {}
                StoreState::Draining => warnings.push(format!(
                    "store {:?} is being drained: {reason}",
                    store.name.as_str()
                )),
                StoreState::Drained => warnings.push(format!(
                    "store {:?} is drained; remove it (volctl store remove {}), or use it again (volctl store drain {} --cancel)",
                    store.name.as_str(),
                    store.name,
                    store.name
                )),
                StoreState::Lost => warnings.push(format!(
                    "store {:?} is lost: {reason}",
                    store.name.as_str()
                )),
                StoreState::Offline => {
                    warnings.push(format!("store {:?} is offline: {reason}", store.name.as_str()))
                }
                StoreState::Faulty => {
                    warnings.push(format!(
                        "store {0:?} is faulty: {reason}; look at the device, then: volctl store reopen {0}",
                        store.name.as_str()
                    ))
                }
            }
            if store.state == StoreState::Online
                && store.total_bytes > 0
                && store.free_bytes * 20 < store.total_bytes
            {
                warnings.push(format!(
                    "store {:?} is nearly full: {} of {} MiB are free; add a store or delete volumes",
                    store.name.as_str(),
                    store.free_bytes >> 20,
                    store.total_bytes >> 20
                ));
            }
        }
        warnings.extend(self.damaged_stores());
        for volume in &volumes {
            if volume.phase == Phase::Creating {
                warnings.push(format!(
                    "volume {}: its creation is unfinished; if it was interrupted, it is rolled back when vold starts with its stores",
                    volume.path
                ));
                continue;
            }
            if volume.phase == Phase::Destroying {
                continue;
            }
            warnings.extend(self.replica_warnings(volume).await?);
            if let Some(report) = self.report(volume.id).await? {
                if let Some(failure) = report.failure {
                    warnings.push(format!("volume {} has stopped: {failure}", volume.path));
                }
                if report.stats.lost_blocks > 0 {
                    warnings.push(format!(
                        "volume {}: {} blocks have no good copy",
                        volume.path, report.stats.lost_blocks
                    ));
                }
            } else if let Some(reason) = self.failure(volume.id) {
                warnings.push(format!("volume {} is not served: {reason}", volume.path));
            } else if let Some(scrub) = self.look(|view| view.get::<ScrubRecord>(volume.id))?
                && let Some(lost) = scrub.last.map(|pass| pass.lost_blocks)
                && lost > 0
            {
                warnings.push(format!(
                    "volume {}: the last integrity scrub found {lost} blocks without a good copy",
                    volume.path
                ));
            }
        }
        let load = self.load().await?;
        Ok(control::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_seconds: self.started.elapsed().as_secs(),
            io_engine: self.shards.engine().into(),
            shards: self.shards.count(),
            stores,
            customers,
            vms,
            volumes: volumes.iter().filter(|v| v.phase != Phase::Creating).count(),
            attachments,
            destroying: destroys
                .iter()
                .filter(|d| d.finished_unix_seconds.is_none())
                .count(),
            connections: load.connections,
            handshakes: load.handshakes,
            tasks: load.tasks,
            warnings,
        })
    }
}
