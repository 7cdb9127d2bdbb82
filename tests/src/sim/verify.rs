//! A freshly opened volume held to the oracle, and its replicas in sync to each other.

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use libvol::buf::Buf;
use libvol::ids::PhysicalExtent;
use libvol::limits::SECTOR_SIZE;
use libvol::runtime::{sleep, timeout};
use libvol::store::Member;
use libvol::volume::{PlainPart, Volume};

use super::catalog::Entry;
use super::life::{Running, STUCK};
use super::plan::EXTENT_BYTES;

impl Running {
    /// Holds all of a freshly opened volume to the oracle, and its replicas to each other.
    pub(super) async fn verify(&self, number: u32, volume: &Rc<Volume>) -> bool {
        let mut rng = self.rng("verify", number);
        let size = volume.size_bytes() as usize;
        // In pieces of any order, so that recovery on demand and in the background meet.
        let piece = match rng.one_in(2) {
            true => size,
            false => SECTOR_SIZE * (1 + rng.below(3 * EXTENT_BYTES / SECTOR_SIZE as u64) as usize),
        };
        let mut starts: Vec<usize> = (0..size).step_by(piece).collect();
        for i in (1..starts.len()).rev() {
            starts.swap(i, rng.below(i as u64 + 1) as usize);
        }
        let mut found = vec![0; size];
        for start in starts {
            let range = start..size.min(start + piece);
            let Some(result) = timeout(STUCK, read(volume, range.clone(), &mut found[range])).await else {
                panic!("volume {number}: a read does not end");
            };
            if let Err(error) = result {
                self.tolerate(number, &error);
                return false;
            }
        }
        {
            let mut models = self.life.models.borrow_mut();
            let model = models.get_mut(&number).expect("it serves");
            model.check_after_cut(&found);
        }
        while volume.stats().recovering_extents > 0 && volume.failure().is_none() {
            sleep(Duration::from_millis(1)).await;
        }
        if self.must_answer(number) {
            assert_eq!(volume.stats().lost_blocks, 0, "volume {number}");
            assert_eq!(volume.failure(), None, "volume {number}");
        }
        self.compare_replicas(number, volume).await;
        true
    }

    /// In-sync replicas have the same extents with the same ciphertext; nothing is being written. The cleaner may give back
    /// extents of holes between two looks, and a replica may be dropped, so some look must find them equal.
    async fn compare_replicas(&self, number: u32, volume: &Volume) {
        let Some(entry) = self.life.catalog.entry(number) else {
            return;
        };
        let damaged = &self.life.damaged_disks;
        if entry.replicas.iter().any(|disk| damaged.contains(disk)) {
            // Damage is found when it is read; it is held to the others at rest.
            return;
        }
        let mut difference = String::new();
        for _ in 0..100 {
            match self.difference(&entry, volume).await {
                // It cannot be read; it is held to the others at rest, too.
                None => return,
                Some(found) if found.is_empty() => return,
                Some(found) => difference = found,
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("volume {number}: {difference}");
    }

    /// How its replicas in sync differ; empty when they do not. `None` when a device fails.
    async fn difference(&self, entry: &Entry, volume: &Volume) -> Option<String> {
        let mut first: Option<(usize, Vec<(u32, Buf)>)> = None;
        let states = volume.replicas();
        let each = entry.replicas.iter().zip(states);
        for (disk, _) in each.filter(|(_, replica)| replica.state == Member::InSync) {
            let contents = self.contents(*disk, entry).await?;
            let Some((other, first)) = &first else {
                first = Some((*disk, contents));
                continue;
            };
            let logical = |all: &[(u32, Buf)]| all.iter().map(|(at, _)| *at).collect::<Vec<_>>();
            let (a, b) = (logical(first), logical(&contents));
            if a != b {
                return Some(format!("disks {other} and {disk} have extents {a:?} and {b:?}"));
            }
            let mut pairs = first.iter().zip(&contents);
            if let Some(((at, _), _)) = pairs.find(|((_, a), (_, b))| a[..] != b[..]) {
                return Some(format!("extent {at} differs on disks {other} and {disk}"));
            }
        }
        Some(String::new())
    }

    async fn contents(&self, disk: usize, entry: &Entry) -> Option<Vec<(u32, Buf)>> {
        let open = self.seat(disk)?;
        let extents = self
            .patiently(disk, open.handle.extents_of(entry.dataset()))
            .await;
        let extents = match extents {
            Ok(extents) => extents,
            Err(error) => {
                self.tolerate_on(disk, &error);
                return None;
            }
        };
        let mut contents = Vec::new();
        for extent in extents {
            contents.push((extent.logical.0, self.raw(disk, extent.physical).await?));
        }
        Some(contents)
    }

    async fn raw(&self, disk: usize, extent: PhysicalExtent) -> Option<Buf> {
        let open = self.seat(disk)?;
        let len = EXTENT_BYTES as usize;
        let read = async {
            let (result, buf) = open.io.read(extent, 0, Buf::zeroed(len), len).await;
            result.map(|()| buf)
        };
        match self.patiently(disk, read).await {
            Ok(buf) => Some(buf),
            Err(error) => {
                self.tolerate_on(disk, &error);
                None
            }
        }
    }
}

/// Reads bytes of a volume.
///
/// # Errors
/// The volume's.
pub async fn read(volume: &Volume, range: Range<usize>, out: &mut [u8]) -> libvol::Result<()> {
    let mut at = 0;
    for part in volume.read(range.start as u64, range.len() as u32).await? {
        match part {
            PlainPart::Data(plain, bytes) => {
                out[at..at + bytes.len()].copy_from_slice(&plain.0[bytes.clone()]);
                at += bytes.len();
            }
            PlainPart::Zeros(zeros) => {
                out[at..at + zeros].fill(0);
                at += zeros;
            }
        }
    }
    assert_eq!(at, range.len(), "a read is whole");
    Ok(())
}
