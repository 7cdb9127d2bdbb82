//! Where a replica that moves goes to.

use std::collections::HashSet;

use libvol::catalog::{Leaving, StoreRecord, VolumeRecord};
use libvol::ids::{Name, StoreId};
use libvol::store::{self, Member, StoreHandle};
use libvol::{Error, Result};

use crate::operations::{Operations, Seat};

impl Operations {
    /// The store that takes a volume's next replica: of another zone than the replicas that stay, with extents of the same
    /// size, with room for all the volume holds, and the most of it.
    pub(super) async fn target(
        &self,
        volume: &VolumeRecord,
        leaving: impl Fn(StoreId) -> Option<Leaving>,
    ) -> Result<StoreHandle> {
        let stores = self.look(|view| view.all::<StoreRecord>())?;
        let of = |id: StoreId| stores.iter().find(|store| store.id == id);
        let held: Vec<&StoreRecord> = volume
            .held()
            .filter_map(|(_, replica)| of(replica.store))
            .collect();
        let stays = held.iter().filter(|store| leaving(store.id).is_none());
        let zones: HashSet<&Name> = stays.map(|store| &store.zone).collect();
        let extent_bytes = held.first().map_or(0, |store| store.extent_bytes);
        let needed = self.extents_held(volume).await * extent_bytes;
        let mut candidates = self.candidates()?;
        candidates.retain(|candidate| {
            candidate.extent_bytes == extent_bytes
                && !zones.contains(&candidate.zone)
                && held.iter().all(|store| store.id != candidate.id)
        });
        for candidate in &mut candidates {
            let promised = self.promised(candidate.id, extent_bytes).await?;
            candidate.free_bytes = candidate.free_bytes.saturating_sub(promised);
        }
        candidates.retain(|candidate| candidate.free_bytes >= needed);
        candidates.sort_by_key(|candidate| std::cmp::Reverse(candidate.free_bytes));
        let mut had_it = Vec::new();
        for candidate in candidates {
            let Seat::Open(handle) = self.seat(candidate.id) else {
                continue;
            };
            if self.state_on(&handle, volume.id).await? == store::VolumeState::Unknown {
                return Ok(handle);
            }
            had_it.push(handle.info().name.to_string());
        }
        let passed_over = match had_it.is_empty() {
            true => String::new(),
            false => format!(
                " ({} has held a replica of it before, and cannot again)",
                had_it.join(", ")
            ),
        };
        Err(Error::no_space(format!(
            "no store is online in another zone with extents of {} KiB and {} MiB free{passed_over}; add one",
            extent_bytes >> 10,
            needed >> 20
        )))
    }

    /// Extents that a replica in sync of the volume holds.
    async fn extents_held(&self, volume: &VolumeRecord) -> u64 {
        for (replica, handle) in self.stores_at_hand(volume) {
            if replica.state != Member::InSync {
                continue;
            }
            if let Ok(extents) = self.extents_of(&handle, volume.dataset).await {
                return extents.len() as u64;
            }
        }
        0
    }

    /// Bytes that replicas which are not in sync will still take of a store, beyond what they have there.
    async fn promised(&self, store: StoreId, extent_bytes: u64) -> Result<u64> {
        let mut promised = 0;
        for volume in self.look(|view| view.all::<VolumeRecord>())? {
            let coming = volume
                .held()
                .any(|(_, replica)| replica.store == store && replica.state != Member::InSync);
            if let (true, Seat::Open(handle)) = (coming, self.seat(store)) {
                let has = self.extents_of(&handle, volume.dataset).await?.len() as u64;
                promised += self.extents_held(&volume).await.saturating_sub(has) * extent_bytes;
            }
        }
        Ok(promised)
    }
}
