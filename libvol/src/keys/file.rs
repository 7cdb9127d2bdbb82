//! The keystore file: header and slots, two copies of each page, changed in place.
//!
//! A page is changed one copy after the other: write, sync, read back from the device, and only then the second copy. A
//! crash at any point leaves at least one copy that is whole; the higher sequence wins at open, and the other is brought
//! up to it. Which pairs of copies can occur, and what each means, is the table in [`settle`].
//!
//! Reading back goes through O_DIRECT where the file system has it; elsewhere the page cache is dropped first and the
//! check is as good as that.
//!
//! Deliberately not here: what a slot's keys are, who may use them, and locking (the caller's).

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::page::{CHUNKS_MAX, CmkState, Decoded, Header, PAGE_BYTES, Page, SLOTS_PER_CHUNK, Slot};
use crate::buf::Buf;
use crate::error::{Error, Kind, Result};

const BLANK: Page = [0; PAGE_BYTES];
/// Pages of a chunk: all first copies, then all second copies, so that no one device block holds both.
const PAGES_PER_CHUNK: u64 = 2 * SLOTS_PER_CHUNK as u64;
/// Pages before the first chunk: the header's two copies.
const HEADER_PAGES: u64 = 2;

/// The file, open for change.
#[derive(Debug)]
pub(crate) struct KeystoreFile {
    path: PathBuf,
    file: File,
    /// The same file through O_DIRECT, for reading back.
    direct: Option<File>,
    header: Header,
}

/// What a slot holds after [`KeystoreFile::open`] has settled its copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Both copies are blank.
    Free,
    /// Both copies hold it.
    Used(Slot),
    /// No copy can be used; left as it is, for whoever tries to rescue it.
    Damaged,
}

/// What opening found: each slot, and a line for everything that was wrong.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: KeystoreFile,
    pub(crate) slots: Vec<Settled>,
    pub(crate) findings: Vec<String>,
}

impl KeystoreFile {
    /// Writes a keystore without slots at `path`, which must not exist, and makes it durable (the directory is the
    /// caller's to sync).
    pub(crate) fn create(path: &Path, header: &Header) -> Result<()> {
        assert_eq!(header.chunks, 0);
        let failed = |e| Error::with_source(Kind::Io, format!("cannot write keystore {}", path.display()), e);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        let page = header.encode();
        file.write_all_at(&[page, page].concat(), 0)
            .and_then(|()| file.sync_all())
            .map_err(failed)
    }

    /// Opens a keystore, settles every pair of copies, and finishes destructions that were interrupted.
    ///
    /// # Errors
    /// `NotFound`; `Damaged` when no header copy is good; `Unsupported` for a newer format; `Io`.
    pub(crate) fn open(path: &Path) -> Result<Opened> {
        let shown = path.display();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| Error::with_source(open_kind(&e), format!("cannot open keystore {shown}"), e))?;
        let meta = file
            .metadata()
            .map_err(|e| Error::with_source(Kind::Io, format!("cannot examine {shown}"), e))?;
        if !meta.is_file() {
            return Err(Error::damaged(format!("keystore {shown} is not a regular file")));
        }
        let mut findings = Vec::new();
        let (header, stale_copies) = read_header(&file, path, &mut findings)?;
        let this = Self {
            path: path.to_owned(),
            direct: OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)
                .ok(),
            file,
            header,
        };
        for copy in stale_copies {
            this.write_page(copy, &this.header.encode())?;
        }
        let mut slots = Vec::new();
        for index in 0..this.header.chunks * SLOTS_PER_CHUNK {
            slots.push(this.open_slot(index, &mut findings)?);
        }
        Ok(Opened {
            file: this,
            slots,
            findings,
        })
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Adds a chunk of free slots and returns the first one's number.
    ///
    /// # Errors
    /// `NoSpace` at the cap or when the file system is full; `Io`.
    pub(crate) fn grow(&mut self) -> Result<u32> {
        let chunks = self.header.chunks;
        if chunks == CHUNKS_MAX {
            return Err(Error::no_space(format!(
                "keystore {} holds {} CMKs, the most it may; remove customers that are gone",
                self.path.display(),
                CHUNKS_MAX * SLOTS_PER_CHUNK
            )));
        }
        // Zeros over whatever an interrupted growth left, durable before the header says they are slots.
        let at = (HEADER_PAGES + u64::from(chunks) * PAGES_PER_CHUNK) * PAGE_BYTES as u64;
        let zeros = vec![0; PAGES_PER_CHUNK as usize * PAGE_BYTES];
        self.file
            .write_all_at(&zeros, at)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.failed("grow", e))?;
        let header = Header {
            sequence: self.header.sequence + 1,
            chunks: chunks + 1,
            ..self.header.clone()
        };
        let page = header.encode();
        self.write_page(0, &page)?;
        self.write_page(1, &page)?;
        self.header = header;
        Ok(chunks * SLOTS_PER_CHUNK)
    }

    /// Writes both copies of a slot, one after the other, each read back.
    ///
    /// # Errors
    /// `Io`, also when the device returns other bytes than were written.
    pub(crate) fn write_slot(&self, slot: &Slot) -> Result<()> {
        let page = slot.encode();
        let [first, second] = copies_of(slot.index);
        self.write_page(first, &page)?;
        self.write_page(second, &page)
    }

    /// Removes a slot's keys for good. First copy 1 becomes a page without keys that says so and outranks copy 2, so that a
    /// crash from there on ends in destruction, never in half of it; then both copies are zeroed.
    ///
    /// # Errors
    /// As [`KeystoreFile::write_slot`].
    pub(crate) fn destroy_slot(&self, slot: &Slot) -> Result<()> {
        let destroying = Slot {
            sequence: slot.sequence + 1,
            state: CmkState::Destroying,
            versions: Vec::new(),
            ..slot.clone()
        };
        self.write_page(copies_of(slot.index)[0], &destroying.encode())?;
        self.finish_destruction(slot.index)
    }

    /// Copy 2 first: as long as it may hold keys, copy 1 says that they are being destroyed.
    fn finish_destruction(&self, index: u32) -> Result<()> {
        let [first, second] = copies_of(index);
        self.write_page(second, &BLANK)?;
        self.write_page(first, &BLANK)
    }

    fn open_slot(&self, index: u32, findings: &mut Vec<String>) -> Result<Settled> {
        let pages = copies_of(index);
        let mut copies = [Decoded::Blank, Decoded::Blank];
        for (copy, page) in copies.iter_mut().zip(pages) {
            *copy = match self.read_page(page)? {
                Some(bytes) => Slot::decode(&bytes, index),
                None => Decoded::Bad("the file ends before it".into()),
            };
            if let Decoded::Newer(version) = copy {
                return Err(self.newer(*version));
            }
        }
        let verdict = settle(&copies);
        for (number, copy) in copies.iter().enumerate() {
            if let Decoded::Bad(why) = copy {
                findings.push(format!(
                    "keystore {}: copy {} of slot {index} is damaged ({why}); {}",
                    self.path.display(),
                    number + 1,
                    verdict.consequence()
                ));
            }
        }
        match verdict {
            Verdict::Free => Ok(Settled::Free),
            Verdict::Contradiction => {
                findings.push(format!(
                    "keystore {}: the copies of slot {index} contradict each other; {}",
                    self.path.display(),
                    verdict.consequence()
                ));
                Ok(Settled::Damaged)
            }
            Verdict::Lost => Ok(Settled::Damaged),
            Verdict::Leftover => {
                self.write_page(pages[0], &BLANK)?;
                Ok(Settled::Free)
            }
            Verdict::Use { winner, rewrite } => {
                let Decoded::Good(slot) = &copies[winner] else {
                    unreachable!("a winner is good")
                };
                if slot.state == CmkState::Destroying {
                    self.finish_destruction(index)?;
                    return Ok(Settled::Free);
                }
                if let Some(other) = rewrite {
                    self.write_page(pages[other], &slot.encode())?;
                }
                Ok(Settled::Used(slot.clone()))
            }
        }
    }

    /// One page of the file, `None` beyond its end.
    fn read_page(&self, page: u64) -> Result<Option<Page>> {
        read_page(&self.file, page).map_err(|e| self.failed("read", e))
    }

    /// Writes a page, makes it durable, and reads it back.
    fn write_page(&self, page: u64, bytes: &Page) -> Result<()> {
        let at = page * PAGE_BYTES as u64;
        #[cfg(test)]
        if let Some(sectors) = power_cut::strikes() {
            self.file
                .write_all_at(&bytes[..sectors * 512], at)
                .expect("the test's own write");
            return Err(Error::io("power cut"));
        }
        // sync_all rather than sync_data: a rewrite of a cut-off copy makes the file longer.
        self.file
            .write_all_at(bytes, at)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.failed("write", e))?;
        let mut back = Buf::zeroed(PAGE_BYTES);
        self.read_back(&mut back, at)
            .map_err(|e| self.failed("read back", e))?;
        if back[..] != bytes[..] {
            return Err(Error::io(format!(
                "keystore {}: page {page} reads back other bytes than were written; replace the device",
                self.path.display()
            )));
        }
        Ok(())
    }

    fn read_back(&self, back: &mut Buf, at: u64) -> std::io::Result<()> {
        if let Some(direct) = &self.direct {
            match direct.read_exact_at(back, at) {
                // Some file systems take the flag and refuse the read.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => return other,
            }
        }
        // Without O_DIRECT: drop the cached page and read it the ordinary way.
        let length = std::num::NonZeroU64::new(PAGE_BYTES as u64);
        rustix::fs::fadvise(&self.file, at, length, rustix::fs::Advice::DontNeed)?;
        self.file.read_exact_at(back, at)
    }

    fn failed(&self, what: &str, source: std::io::Error) -> Error {
        let kind = if source.kind() == ErrorKind::StorageFull {
            Kind::NoSpace
        } else {
            Kind::Io
        };
        Error::with_source(
            kind,
            format!("cannot {what} keystore {}", self.path.display()),
            source,
        )
    }

    fn newer(&self, version: u32) -> Error {
        newer(&self.path, version)
    }
}

fn newer(path: &Path, version: u32) -> Error {
    Error::unsupported(format!(
        "keystore {} has format version {version}, this vold knows up to {}; run the vold that wrote it",
        path.display(),
        super::page::VERSION
    ))
}

fn open_kind(error: &std::io::Error) -> Kind {
    if error.kind() == ErrorKind::NotFound {
        Kind::NotFound
    } else {
        Kind::Io
    }
}

/// The pages of a slot's two copies.
fn copies_of(index: u32) -> [u64; 2] {
    let (chunk, within) = (
        u64::from(index / SLOTS_PER_CHUNK),
        u64::from(index % SLOTS_PER_CHUNK),
    );
    let first = HEADER_PAGES + chunk * PAGES_PER_CHUNK + within;
    [first, first + u64::from(SLOTS_PER_CHUNK)]
}

fn read_page(file: &File, page: u64) -> std::io::Result<Option<Page>> {
    let mut bytes = BLANK;
    match file.read_exact_at(&mut bytes, page * PAGE_BYTES as u64) {
        Ok(()) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(e) => Err(e),
    }
}

/// The header that holds, and the copies that have to be brought up to it.
fn read_header(file: &File, path: &Path, findings: &mut Vec<String>) -> Result<(Header, Vec<u64>)> {
    let failed = |e| Error::with_source(Kind::Io, format!("cannot read keystore {}", path.display()), e);
    let mut good: Vec<(u64, Header)> = Vec::new();
    let mut reasons = Vec::new();
    for copy in [0, 1] {
        let decoded = match read_page(file, copy).map_err(failed)? {
            Some(page) => Header::decode(&page),
            None => Decoded::Bad("the file ends before it".into()),
        };
        match decoded {
            Decoded::Good(header) => good.push((copy, header)),
            Decoded::Newer(version) => return Err(newer(path, version)),
            Decoded::Blank => reasons.push((copy, "it is blank".to_owned())),
            Decoded::Bad(why) => reasons.push((copy, why)),
        }
    }
    let Some(winner) = good
        .iter()
        .map(|(_, header)| header)
        .max_by_key(|header| header.sequence)
        .cloned()
    else {
        return Err(Error::damaged(format!(
            "{} is not a vold keystore, or both copies of its header are damaged ({}); restore it from a backup",
            path.display(),
            reasons[0].1
        )));
    };
    for (copy, why) in &reasons {
        findings.push(format!(
            "keystore {}: copy {} of the header is damaged ({why}); the other is used, and this one rewritten",
            path.display(),
            copy + 1
        ));
    }
    let stale = [0, 1]
        .into_iter()
        .filter(|copy| !good.contains(&(*copy, winner.clone())))
        .collect();
    Ok((winner, stale))
}

/// What a pair of copies means.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Free,
    /// `winner` holds; `rewrite` has to be brought up to it.
    Use {
        winner: usize,
        rewrite: Option<usize>,
    },
    /// Copy 1 of a change that never completed and left nothing in copy 2.
    Leftover,
    Lost,
    Contradiction,
}

impl Verdict {
    fn consequence(&self) -> &'static str {
        match self {
            Verdict::Use { .. } => "the other is used, and this one rewritten",
            Verdict::Leftover => "it is left from an interrupted change, and cleared",
            Verdict::Free => "nothing is lost",
            Verdict::Lost | Verdict::Contradiction => {
                "volumes under the CMK in that slot cannot be opened until the keystore is restored from a backup"
            }
        }
    }
}

/// Changes go copy 1 then copy 2, destruction clears copy 2 then copy 1; each step is durable before the next.
///
/// | copy 1 | copy 2 | means |
/// |---|---|---|
/// | blank | blank | free |
/// | good | good, lower | an update reached copy 1 only: bring copy 2 up |
/// | good | good, higher | copy 1 missed a write: damage, bring it up |
/// | good | good, same bytes | at rest |
/// | good | good, same sequence, other bytes | no order of writes makes this: contradiction |
/// | good | blank or bad | a creation or update between the copies, or damage of copy 2: bring it up |
/// | blank or bad | good | an update torn in copy 1, or damage of it: bring it up |
/// | bad | blank | a torn creation or the torn end of a destruction: clear it |
/// | blank or bad | bad | damage: lost |
fn settle(copies: &[Decoded<Slot>; 2]) -> Verdict {
    use Decoded::{Bad, Blank, Good, Newer};
    let use_one = |winner: usize| Verdict::Use {
        winner,
        rewrite: Some(1 - winner),
    };
    match copies {
        [Blank, Blank] => Verdict::Free,
        [Good(a), Good(b)] if a == b => Verdict::Use {
            winner: 0,
            rewrite: None,
        },
        [Good(a), Good(b)] if a.sequence > b.sequence => use_one(0),
        [Good(a), Good(b)] if a.sequence < b.sequence => use_one(1),
        [Good(_), Good(_)] => Verdict::Contradiction,
        [Good(_), Blank | Bad(_)] => use_one(0),
        [Blank | Bad(_), Good(_)] => use_one(1),
        [Bad(_), Blank] => Verdict::Leftover,
        [Blank | Bad(_), Bad(_)] => Verdict::Lost,
        [Newer(_), _] | [_, Newer(_)] => {
            unreachable!("a newer format is refused before its copies are compared")
        }
    }
}

/// Lets a test stop a change after any of its page writes, in the order in which the real code makes them.
#[cfg(test)]
pub(crate) mod power_cut {
    use std::cell::Cell;

    thread_local! {
        static CUT: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
    }

    /// Runs `change`; of its page writes the first `writes` happen, the next leaves `sectors` sectors, the rest nothing.
    pub(crate) fn after<T>(writes: usize, sectors: usize, change: impl FnOnce() -> T) -> T {
        CUT.set(Some((writes, sectors)));
        let result = change();
        CUT.set(None);
        result
    }

    pub(super) fn strikes() -> Option<usize> {
        let (writes, sectors) = CUT.get()?;
        if writes == 0 {
            CUT.set(Some((0, 0)));
            return Some(sectors);
        }
        CUT.set(Some((writes - 1, sectors)));
        None
    }
}
