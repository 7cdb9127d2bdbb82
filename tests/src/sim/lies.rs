//! A disk that acknowledges zeros and keeps what was there: what a scrub has overwritten is still to be read.

use libvol::disk::sim::{Silent, SimDriver};

/// First bytes of every checksum area.
const AREA_MAGIC: &[u8] = b"VOLDSUMS";

/// Lets the zeros get lost that are written over a checksum area. Only scrubs write such zeros, where those over data may be
/// a volume's holes.
pub fn allow_lost_zeros(driver: &SimDriver) {
    driver.allow_silent(Some(Box::new(|_, silent, media, data| {
        let Silent::Lost { at, len } = silent else {
            return false;
        };
        let mut old = vec![0; len];
        media.read(at, &mut old);
        old.starts_with(AREA_MAGIC) && data.iter().all(|byte| *byte == 0)
    })));
}
