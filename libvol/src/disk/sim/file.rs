//! A simulated file, for what waits for its disk itself instead of going through a driver: the catalog's database.
//!
//! It is read and written at one instant, and journals what was asked of it. Whoever uses it says when others may rely on
//! what was done ([`SimFile::settle`]); a power cut comes anywhere in the journal from there on. What no sync had
//! covered at that point is kept, dropped, reordered or torn, as on a [`Media`](super::Media); of the lengths that were set,
//! the first ones have taken effect, any number of them.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::media::{Bytes, Cut};
use super::rng::Rng;
use crate::limits::{BLOCK, BLOCK_SIZE, SECTOR_SIZE};

/// What was asked of the file.
#[derive(Clone)]
enum Asked {
    Write { at: u64, data: Data },
    SetLen(u64),
    Sync,
}

/// What is written; whole blocks are shared by all that hold them.
#[derive(Clone)]
enum Data {
    Blocks(Vec<Arc<[u8; BLOCK_SIZE]>>),
    Bytes(Vec<u8>),
}

impl Data {
    fn new(at: u64, data: &[u8]) -> Self {
        let (blocks, rest) = data.as_chunks::<BLOCK_SIZE>();
        match at.is_multiple_of(BLOCK) && rest.is_empty() {
            true => Self::Blocks(blocks.iter().map(|block| Arc::new(*block)).collect()),
            false => Self::Bytes(data.to_vec()),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Blocks(blocks) => blocks.len() as u64 * BLOCK,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    fn write(&self, at: u64, bytes: &mut Bytes) {
        match self {
            Self::Blocks(blocks) => (at / BLOCK..)
                .zip(blocks)
                .for_each(|(block, data)| bytes.put(block, data)),
            Self::Bytes(data) => bytes.write(at, data),
        }
    }

    fn to_vec(&self) -> Vec<u8> {
        match self {
            Self::Blocks(blocks) => blocks.iter().flat_map(|block| block.iter().copied()).collect(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// Contents and length.
#[derive(Clone, Default)]
struct Image {
    bytes: Bytes,
    len: u64,
}

impl Image {
    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.bytes.clip(len);
        }
        self.len = len;
    }

    fn apply(&mut self, asked: &Asked) {
        match asked {
            Asked::Write { at, data } => data.write(*at, &mut self.bytes),
            Asked::SetLen(len) => self.set_len(*len),
            Asked::Sync => {}
        }
    }
}

#[derive(Default)]
struct State {
    /// As reads see it.
    now: Image,
    /// As it was, all of it durable, before the journal begins.
    before: Image,
    journal: Vec<Asked>,
    /// Of the journal, so much is relied on.
    relied_on: usize,
    /// So many operations came before the journal begins.
    forgotten: u64,
    /// Whoever has it open can do nothing any more.
    unplugged: bool,
    hash: u64,
}

/// See the module's text. Clones are the same file.
#[derive(Clone, Default)]
pub struct SimFile(Arc<Mutex<State>>);

impl SimFile {
    /// Another file with the same contents, all durable.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::of(self.state().now.clone(), 0)
    }

    fn of(image: Image, hash: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            before: image.clone(),
            now: image,
            hash,
            ..State::default()
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the journal has come, for [`SimFile::settle`].
    pub fn mark(&self) -> u64 {
        let state = self.state();
        state.forgotten + state.journal.len() as u64
    }

    /// Somebody relies on all that was done up to there: a power cut comes after it.
    pub fn settle(&self, mark: u64) {
        let state = &mut *self.state();
        let relied_on = mark.saturating_sub(state.forgotten) as usize;
        let relied_on = relied_on.max(state.relied_on).min(state.journal.len());
        let asked = &state.journal[..relied_on];
        let synced = asked.iter().rposition(|asked| matches!(asked, Asked::Sync));
        // What is durable needs no journal.
        let durable = synced.map_or(0, |at| at + 1);
        for asked in state.journal.drain(..durable) {
            state.before.apply(&asked);
        }
        state.forgotten += durable as u64;
        state.relied_on = relied_on - durable;
    }

    /// The power goes: the file as it is found afterwards. Nobody can use this one any more.
    #[must_use]
    pub fn after_cut(&self, cut: Cut, rng: &mut Rng) -> Self {
        let mut state = self.state();
        state.unplugged = true;
        let choices = (state.journal.len() - state.relied_on) as u64 + 1;
        let asked = &state.journal[..state.relied_on + rng.below(choices) as usize];
        let synced = asked.iter().rposition(|asked| matches!(asked, Asked::Sync));
        let (durable, unsynced) = asked.split_at(synced.map_or(0, |at| at + 1));
        let mut image = state.before.clone();
        durable.iter().for_each(|asked| image.apply(asked));
        land(&mut image, unsynced, cut, rng);
        Self::of(image, mixed(state.hash, asked.len() as u64))
    }

    /// The process ends, and the machine goes on: the file as it is found afterwards, no more durable than before. Nobody can
    /// use this one any more.
    #[must_use]
    pub fn after_exit(&self) -> Self {
        let mut state = self.state();
        state.unplugged = true;
        Self(Arc::new(Mutex::new(State {
            now: state.now.clone(),
            before: state.before.clone(),
            journal: state.journal.clone(),
            relied_on: state.relied_on,
            forgotten: state.forgotten,
            unplugged: false,
            hash: state.hash,
        })))
    }

    /// Equal for equal histories: of what was asked, and of where cuts came.
    pub fn trace_hash(&self) -> u64 {
        self.state().hash
    }

    fn plugged(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        match state.unplugged {
            true => Err(io::Error::other("the power is off")),
            false => Ok(state),
        }
    }

    fn ask(&self, asked: Asked) -> io::Result<()> {
        let mut state = self.plugged()?;
        state.now.apply(&asked);
        state.journal.push(asked);
        Ok(())
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.plugged()?.now.len)
    }

    pub(crate) fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.plugged()?;
        if at + out.len() as u64 > state.now.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.now.bytes.read(at, out);
        Ok(())
    }

    pub(crate) fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let end = at + data.len() as u64;
        if end > self.len()? {
            self.set_len(end)?;
        }
        self.ask(Asked::Write {
            at,
            data: Data::new(at, data),
        })
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.ask(Asked::SetLen(len))
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.ask(Asked::Sync)?;
        let state = &mut *self.state();
        let earlier = state.journal.len() - 1;
        let from = state.journal[..earlier]
            .iter()
            .rposition(|asked| !matches!(asked, Asked::Write { .. }));
        // Writes between two syncs have no order. They are put in one that does not depend on how many locks the database
        // makes itself on this machine.
        let writes = &mut state.journal[from.map_or(0, |at| at + 1)..earlier];
        writes.sort_by_key(|asked| match asked {
            Asked::Write { at, .. } => *at,
            _ => unreachable!("only writes"),
        });
        for asked in writes {
            if let Asked::Write { at, data } = asked {
                state.hash = mixed(mixed(state.hash, *at), data.len());
            }
        }
        state.hash = mixed(state.hash, state.now.len);
        Ok(())
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a simulated file of {} bytes", self.state().now.len)
    }
}

fn mixed(hash: u64, value: u64) -> u64 {
    Rng::new(hash ^ value).next_u64()
}

/// What a cut makes of operations that no sync has covered.
fn land(image: &mut Image, unsynced: &[Asked], cut: Cut, rng: &mut Rng) {
    let torn = match cut {
        Cut::DropAll => return,
        Cut::KeepAll => return unsynced.iter().for_each(|asked| image.apply(asked)),
        Cut::WholeWrites => false,
        Cut::TornSectors => true,
    };
    let (mut lens, mut writes) = (Vec::new(), Vec::new());
    for asked in unsynced {
        match asked {
            Asked::SetLen(len) => lens.push(*len),
            Asked::Write { at, data } => writes.push((*at, data)),
            Asked::Sync => unreachable!("not covered by one"),
        }
    }
    lens.truncate(rng.below(lens.len() as u64 + 1) as usize);
    lens.iter().for_each(|len| image.set_len(*len));
    for i in (1..writes.len()).rev() {
        writes.swap(i, rng.below(i as u64 + 1) as usize);
    }
    for (at, data) in writes {
        let data = data.to_vec();
        let piece = if torn { SECTOR_SIZE } else { data.len() };
        for (i, piece_of) in data.chunks(piece.max(1)).enumerate() {
            if rng.one_in(2) {
                image.bytes.write(at + (i * piece) as u64, piece_of);
            }
        }
    }
    // Nothing lies behind a file's end.
    image.bytes.clip(image.len);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(file: &SimFile) -> Vec<u8> {
        let mut out = vec![0; file.len().unwrap() as usize];
        file.read(0, &mut out).unwrap();
        out
    }

    /// All that a cut can leave.
    fn outcomes(file: impl Fn() -> SimFile, cut: Cut) -> std::collections::BTreeSet<Vec<u8>> {
        let mut rng = Rng::new(7);
        (0..200)
            .map(|_| bytes(&file().after_cut(cut, &mut rng)))
            .collect()
    }

    fn written() -> SimFile {
        let file = SimFile::default();
        file.write(0, &[1; 4096]).unwrap();
        file.sync().unwrap();
        file.settle(file.mark());
        file.write(0, &[2; 4096]).unwrap();
        file
    }

    #[test]
    fn an_unsynced_write_is_dropped_kept_or_torn_by_sectors() {
        let (old, new) = (vec![1; 4096], vec![2; 4096]);
        assert_eq!(outcomes(written, Cut::DropAll), [old.clone()].into());
        assert_eq!(outcomes(written, Cut::KeepAll), [old.clone(), new.clone()].into());
        assert_eq!(outcomes(written, Cut::WholeWrites), [old, new].into());
        let torn = outcomes(written, Cut::TornSectors);
        assert!(torn.len() > 50, "{}", torn.len());
        let mut sectors = torn.iter().flat_map(|bytes| bytes.chunks(SECTOR_SIZE));
        assert!(sectors.all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    }

    #[test]
    fn what_is_synced_and_relied_on_survives_every_cut() {
        let file = || {
            let file = written();
            file.sync().unwrap();
            file.settle(file.mark());
            file
        };
        for cut in [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors] {
            assert_eq!(outcomes(file, cut), [vec![2; 4096]].into());
        }
    }

    #[test]
    fn what_is_relied_on_without_a_sync_may_be_lost_but_was_asked_for() {
        let file = || {
            let file = written();
            file.settle(file.mark());
            file
        };
        assert_eq!(outcomes(file, Cut::KeepAll), [vec![2; 4096]].into());
        assert_eq!(outcomes(file, Cut::DropAll), [vec![1; 4096]].into());
    }

    #[test]
    fn a_new_length_takes_effect_or_not_and_what_a_file_grows_by_is_zero() {
        let grown = || {
            let file = written();
            file.sync().unwrap();
            file.settle(file.mark());
            file.set_len(100).unwrap();
            file.set_len(8192).unwrap();
            file.write(4096, &[3; 4096]).unwrap();
            file
        };
        let mut shrunk = vec![2; 100];
        shrunk.resize(8192, 0);
        for found in outcomes(grown, Cut::WholeWrites) {
            match found.len() {
                4096 => assert_eq!(found, vec![2; 4096]),
                100 => assert_eq!(found, vec![2; 100]),
                8192 => assert_eq!(found[..4096], shrunk[..4096]),
                len => panic!("{len}"),
            }
        }
        assert_eq!(outcomes(grown, Cut::WholeWrites).len(), 4);
    }

    #[test]
    fn nobody_can_use_a_file_whose_power_is_off() {
        let file = written();
        let found = file.after_cut(Cut::KeepAll, &mut Rng::new(1));
        assert!(file.write(0, &[3]).is_err() && file.read(0, &mut [0]).is_err() && file.len().is_err());
        assert!(file.set_len(0).is_err() && file.sync().is_err());
        assert_eq!(bytes(&found).len(), 4096);
    }
}
