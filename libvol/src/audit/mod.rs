//! The audit log: who did what to what, and what the daemon mended by itself.
//!
//! Lines of JSON ([`AuditEntry`]) in files `SEQ.log` (20 digits: the first line's number), each line chained to the one before:
//! its member `previous` is the SHA-256 of that line's bytes, without the line's end. So a line that is changed, taken out or
//! put in breaks the chain at the next line, and the digest of the last line ([`Verified::head`]), kept elsewhere, vouches for
//! all lines before it. (Who can write the files can also make a whole new chain: only a digest kept elsewhere tells.)
//!
//! A line is durable when [`Log::append`] returns. A line that a crash cut short is cut off at the next opening; everything else
//! stays as it is, so that damage is found by [`verify`] and not mended. Files are never deleted here; the oldest may be moved to
//! an archive, and the chain then begins with the first line that is there.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};

use crate::control::{AuditEntry, AuditOutcome, AuditVerified};
use crate::error::{Error, Kind, Result};
use crate::limits::{AUDIT_FILE_BYTES, AUDIT_TEXT_BYTES_MAX};

/// What comes before the first line of all.
const NOTHING: [u8; 32] = [0; 32];
/// No line is longer: texts are cut at [`AUDIT_TEXT_BYTES_MAX`], and JSON makes six bytes of one at most.
const LINE_BYTES_MAX: u64 = 6 * 4 * AUDIT_TEXT_BYTES_MAX as u64 + 512;

/// What is written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who: `uid 0`, or `vold`.
    pub actor: String,
    /// What, as `NOUN.VERB`.
    pub action: String,
    /// To what: a volume's or store's name.
    pub subject: String,
    /// How it ended.
    pub outcome: AuditOutcome,
    /// What else there is to say.
    pub detail: String,
}

/// An open log. One process has it at a time (the data directory's lock).
pub struct Log {
    dir: PathBuf,
    end: Mutex<End>,
}

/// Where the next line goes.
struct End {
    file: File,
    bytes: u64,
    /// The next line's number.
    seq: u64,
    /// Digest of the last line.
    last: [u8; 32],
    /// A line that could not be written may have left a part of itself: it is cut off first.
    torn: bool,
}

impl Log {
    /// Opens the log in a directory that exists; an empty one begins with line 1.
    ///
    /// # Errors
    /// `Io` with the path.
    pub fn open(dir: &Path) -> Result<Self> {
        let end = match files(dir)?.pop() {
            Some((_, path)) => End::of(&path)?,
            None => End::new(dir, 1, NOTHING)?,
        };
        Ok(Self {
            dir: dir.to_owned(),
            end: Mutex::new(end),
        })
    }

    /// Writes an event down; durable when it returns.
    ///
    /// # Errors
    /// `Io`, `NoSpace`. Nothing of it stays then, and the next one is tried anew.
    pub fn append(&self, event: Event) -> Result<()> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.bytes >= AUDIT_FILE_BYTES {
            *end = End::new(&self.dir, end.seq, end.last)?;
        }
        end.append(event)
            .map_err(|e| failed(&self.dir, "the audit log cannot be written", e))
    }

    /// Lines after number `after`, at most `limit`; without `after`, the last ones.
    ///
    /// # Errors
    /// `Io`; `Damaged` when a line among them is no entry.
    pub fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<AuditEntry>> {
        let next = self.end.lock().unwrap_or_else(PoisonError::into_inner).seq;
        let from = after.unwrap_or_else(|| next.saturating_sub(limit as u64 + 1));
        let files = files(&self.dir)?;
        let first = files.iter().rposition(|(seq, _)| *seq <= from + 1).unwrap_or(0);
        let mut found = Vec::new();
        for (_, path) in &files[first..] {
            for line in Lines::of(path)? {
                let (number, bytes) = line?;
                let entry = parse(path, number, &bytes)?;
                if entry.seq > from && found.len() < limit {
                    found.push(entry);
                }
            }
            if found.len() == limit {
                break;
            }
        }
        Ok(found)
    }

    /// Verifies the chain; see [`verify`].
    ///
    /// # Errors
    /// As [`verify`].
    pub fn verify(&self) -> Result<AuditVerified> {
        // No line is being written meanwhile.
        let _end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        verify(&self.dir)
    }
}

/// Verifies every line of the log in a directory: numbers without a gap, each line's digest in the next one.
///
/// # Errors
/// `Damaged` with the first line that does not follow from the one before; `Io`.
pub fn verify(dir: &Path) -> Result<AuditVerified> {
    let mut seen = AuditVerified {
        entries: 0,
        first: 0,
        last: 0,
        head: hex(&NOTHING),
    };
    let mut last = None;
    for (named, path) in files(dir)? {
        for (index, line) in Lines::of(&path)?.enumerate() {
            let (number, bytes) = line?;
            let entry = parse(&path, number, &bytes)?;
            let follows = match &last {
                None => entry.seq != 1 || entry.previous == hex(&NOTHING),
                Some(last) => entry.seq == seen.last + 1 && entry.previous == *last,
            };
            if !follows || (index == 0 && entry.seq != named) {
                return Err(Error::damaged(format!(
                    "{}, line {number}: entry {} does not follow from the one before it (entry {}): lines were changed, taken out or put in",
                    path.display(),
                    entry.seq,
                    seen.last
                )));
            }
            if last.is_none() {
                seen.first = entry.seq;
            }
            seen.last = entry.seq;
            seen.entries += 1;
            seen.head = hex(&sha256(&bytes));
            last = Some(seen.head.clone());
        }
    }
    Ok(seen)
}

impl End {
    /// A new file.
    fn new(dir: &Path, seq: u64, last: [u8; 32]) -> Result<Self> {
        let path = dir.join(format!("{seq:020}.log"));
        let make = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.sync_all()?;
            File::open(dir)?.sync_all()?;
            Ok(file)
        };
        let file = make().map_err(|e| failed(&path, "the audit log's file cannot be made", e))?;
        Ok(Self {
            file,
            bytes: 0,
            seq,
            last,
            torn: false,
        })
    }

    /// Where the last file ends. Of its last line only the bytes matter, so that damage does not stop a start.
    fn of(path: &Path) -> Result<Self> {
        let cannot = |e| failed(path, "the audit log's file cannot be opened", e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(cannot)?;
        let (mut bytes, mut seq) = (0, number_of(path).unwrap_or(1));
        let mut last: Option<Vec<u8>> = None;
        let mut reader = BufReader::new(&mut file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(cannot)?;
            if line.pop() != Some(b'\n') {
                break;
            }
            bytes += read as u64;
            seq += 1;
            last = Some(std::mem::take(&mut line));
        }
        let last = match last {
            Some(last) => {
                if let Ok(entry) = serde_json::from_slice::<AuditEntry>(&last) {
                    seq = entry.seq + 1;
                }
                sha256(&last)
            }
            None => last_line_before(path)?,
        };
        let torn = file.metadata().map_err(cannot)?.len() > bytes;
        Ok(Self {
            file,
            bytes,
            seq,
            last,
            torn,
        })
    }

    fn append(&mut self, event: Event) -> std::io::Result<()> {
        if self.torn {
            self.file.set_len(self.bytes)?;
            self.torn = false;
        }
        let entry = AuditEntry {
            seq: self.seq,
            unix_seconds: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs()),
            actor: cut(event.actor),
            action: cut(event.action),
            subject: cut(event.subject),
            outcome: event.outcome,
            detail: cut(event.detail),
            previous: hex(&self.last),
        };
        let mut line = serde_json::to_vec(&entry)?;
        let digest = sha256(&line);
        line.push(b'\n');
        self.torn = true;
        self.file.write_all_at(&line, self.bytes)?;
        self.file.sync_data()?;
        self.torn = false;
        self.bytes += line.len() as u64;
        self.seq += 1;
        self.last = digest;
        Ok(())
    }
}

/// A file that was begun and has no line: what comes before is the end of the file before it.
fn last_line_before(path: &Path) -> Result<[u8; 32]> {
    let Some(dir) = path.parent() else {
        return Ok(NOTHING);
    };
    let before = files(dir)?.into_iter().rfind(|(_, other)| other.as_path() < path);
    match before {
        Some((_, before)) => Ok(End::of(&before)?.last),
        None => Ok(NOTHING),
    }
}

/// The log's files, the oldest first.
fn files(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = std::fs::read_dir(dir).map_err(|e| failed(dir, "the audit log cannot be read", e))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|e| failed(dir, "the audit log cannot be read", e))?
            .path();
        if let Some(number) = number_of(&path) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

fn number_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".log")?;
    (name.len() == 20).then(|| name.parse().ok())?
}

/// The whole lines of a file, with their numbers in it. What follows the last line's end is not one.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    number: u64,
}

impl<'a> Lines<'a> {
    fn of(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| failed(path, "cannot be read", e))?;
        Ok(Self {
            path,
            reader: BufReader::new(file),
            number: 0,
        })
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(LINE_BYTES_MAX);
        limited
            .read_until(b'\n', &mut line)
            .map_err(|e| failed(self.path, "cannot be read", e))?;
        if line.pop() == Some(b'\n') {
            return Ok(Some(line));
        }
        match line.len() as u64 + 1 >= LINE_BYTES_MAX {
            true => Err(Error::damaged(format!(
                "{}, line {}: longer than any entry",
                self.path.display(),
                self.number + 1
            ))),
            false => Ok(None),
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<(u64, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.next_line().transpose()?;
        self.number += 1;
        Some(line.map(|line| (self.number, line)))
    }
}

fn parse(path: &Path, number: u64, line: &[u8]) -> Result<AuditEntry> {
    serde_json::from_slice(line).map_err(|e| {
        let what = format!("{}, line {number}: not an entry", path.display());
        Error::with_source(Kind::Damaged, what, e)
    })
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes)
        .as_ref()
        .try_into()
        .expect("SHA-256 has 32 bytes")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn cut(mut text: String) -> String {
    if text.len() > AUDIT_TEXT_BYTES_MAX {
        let is_end = |end: &usize| text.is_char_boundary(*end);
        let end = (0..=AUDIT_TEXT_BYTES_MAX).rfind(is_end);
        text.truncate(end.unwrap_or(0));
    }
    text
}

fn failed(path: &Path, what: &str, e: std::io::Error) -> Error {
    Error::with_source(Kind::Io, format!("{}: {what}", path.display()), e)
}

#[cfg(test)]
mod tests;
