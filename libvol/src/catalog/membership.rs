//! The catalog as the register of every volume's membership.

use super::{Catalog, ReplicaRecord, VolumeRecord};
use crate::error::{Error, Result};
use crate::ids::{Epoch, VolumeId};
use crate::store::Member;
use crate::volume::{Membership, Standing};

impl Catalog {
    /// Replaces a volume's membership of epoch `from`, durably: what [`crate::volume::Register`] promises. That nothing a
    /// replica holds can be relied on may have been found without the volume (its store is an old copy of itself), and is
    /// true until it is in sync.
    ///
    /// # Errors
    /// `Busy` when the epoch there is another; `Internal` when the volume is not there; the catalog's own.
    pub fn swap_membership(&self, volume: VolumeId, from: Epoch, to: &Membership) -> Result<()> {
        self.write(|tx| {
            let mut record = tx
                .get::<VolumeRecord>(volume)?
                .ok_or_else(|| Error::internal(format!("volume {volume} is gone from the catalog")))?;
            if record.membership_epoch != from || record.replicas.len() > to.members.len() {
                return Err(Error::busy(format!(
                    "volume {}: its membership is of epoch {}, not {from}",
                    record.path, record.membership_epoch
                )));
            }
            record.membership_epoch = to.epoch;
            let before = record.replicas.iter().map(Some).chain(std::iter::repeat(None));
            let after = to.members.iter().zip(before).map(|(to, from)| replaced(from, to));
            record.replicas = after.collect();
            tx.update(&record)
        })
    }
}

fn replaced(from: Option<&ReplicaRecord>, to: &Standing) -> ReplicaRecord {
    let known_bad = from.is_some_and(|from| from.store == to.store && from.full_copy);
    ReplicaRecord {
        store: to.store,
        state: to.state,
        full_copy: (to.full_copy || known_bad) && matches!(to.state, Member::Stale | Member::Resyncing),
        reason: to.reason.clone(),
    }
}
