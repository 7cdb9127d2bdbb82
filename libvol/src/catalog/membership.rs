//! The catalog as the register of every volume's membership.

use super::{Catalog, VolumeRecord};
use crate::error::{Error, Result};
use crate::ids::{Epoch, VolumeId};
use crate::store::Member;
use crate::volume::Membership;

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
            if record.membership_epoch != from || record.replicas.len() != to.members.len() {
                return Err(Error::busy(format!(
                    "volume {}: its membership is of epoch {}, not {from}",
                    record.path, record.membership_epoch
                )));
            }
            record.membership_epoch = to.epoch;
            for (replica, standing) in record.replicas.iter_mut().zip(&to.members) {
                replica.state = standing.state;
                replica.reason.clone_from(&standing.reason);
                replica.full_copy |= standing.full_copy;
                replica.full_copy &= standing.state != Member::InSync;
            }
            tx.update(&record)
        })
    }
}
