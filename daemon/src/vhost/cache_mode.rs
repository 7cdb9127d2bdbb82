//! Whether the guest writes back or through, kept where a crash of this process leaves it.
//!
//! A guest sets the mode once, and its front-end does not tell it again to a back-end that comes back: a write would then be
//! acknowledged before it is durable to a guest that was promised otherwise. So it is noted behind the queues of the inflight
//! area, which front-ends keep and bring back whole. An area that another program made has no such place, or something else
//! in it.
//!
//! ```text
//! "vold-wce" 8 bytes | mode 8 bytes: 1 back, 2 through
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::inflight::area_bytes;
use super::mapping::{Account, Mapping};

const MAGIC: u64 = u64::from_ne_bytes(*b"vold-wce");
const MODE_AT: usize = 8;
const BACK: u64 = 1;
const THROUGH: u64 = 2;
const BYTES: usize = 16;

/// See the module's text.
pub(super) struct CacheMode(Mapping);

impl CacheMode {
    /// The place behind an area, if there is one.
    pub(super) fn behind(
        account: &Arc<Account>,
        fd: &OwnedFd,
        offset: u64,
        len: u64,
        queues: u16,
        size: u16,
    ) -> Option<Self> {
        let area = area_bytes(queues, size).ok()?;
        if len < area.checked_add(BYTES as u64)? {
            return None;
        }
        Mapping::new(account, fd, offset.checked_add(area)?, BYTES)
            .ok()
            .map(Self)
    }

    /// What was noted: whether it is back.
    pub(super) fn noted(&self) -> Option<bool> {
        match (self.0.load_u64(0), self.0.load_u64(MODE_AT)) {
            (Ok(MAGIC), Ok(BACK)) => Some(true),
            (Ok(MAGIC), Ok(THROUGH)) => Some(false),
            _ => None,
        }
    }

    /// Notes it. Memory that has gone is found by whoever uses the area.
    pub(super) fn note(&self, back: bool) {
        let _ = self.0.store_u64(MODE_AT, if back { BACK } else { THROUGH });
        let _ = self.0.store_u64(0, MAGIC);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::guest::{account, memfd};
    use crate::vhost::inflight::create;

    #[test]
    fn what_was_noted_is_found_again_and_nothing_where_nothing_was() {
        let (fd, len) = create(2, 128).unwrap();
        let find = |len| CacheMode::behind(&account(), &fd, 0, len, 2, 128);
        assert_eq!(find(len).unwrap().noted(), None);
        for back in [false, true] {
            find(len).unwrap().note(back);
            assert_eq!(find(len).unwrap().noted(), Some(back));
        }
        assert!(
            find(area_bytes(2, 128).unwrap()).is_none(),
            "an area without a place for it"
        );
        assert!(CacheMode::behind(&account(), &memfd(4096), u64::MAX - 4, u64::MAX, 1, 64).is_none());
    }
}
