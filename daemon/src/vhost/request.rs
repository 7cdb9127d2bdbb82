//! One block request: from a chain to what is to be done, all of it checked.
//!
//! This is the door: a [`BlockRequest`] lies inside the device, and is of a permitted kind.
//! Header, data and status are found by counting the chain's bytes, however it is cut up: the first 16 bytes to read are the
//! header, what follows is the payload; the last byte to write is the status, what comes before is for the answer. The
//! header and a discard's ranges are copied here, once. Data stays where it is until it is gathered.
//!
//! Source: VIRTIO 1.2, 5.2.6 "Device Operation".

use libvol::limits::SECTOR_SIZE;

use super::chain::Chain;
use super::fault::Fault;
use super::memory::{DirtyLog, GuestMemory};
use super::ring::Ring;

/// Done.
pub(super) const STATUS_OK: u8 = 0;
/// The request is wrong, or the device has failed.
pub(super) const STATUS_IOERR: u8 = 1;
/// The device does not do this.
pub(super) const STATUS_UNSUPP: u8 = 2;

/// Bytes of a header: type 4, reserved 4, sector 8.
const HEADER_BYTES: usize = 16;
/// Bytes of one range to discard or to write zeroes to: sector 8, sectors 4, flags 4.
const RANGE_BYTES: usize = 16;
/// Bytes of a device's identification; shorter ones end with zeros.
pub(super) const ID_BYTES: usize = 20;

const SECTOR: u64 = SECTOR_SIZE as u64;
/// Data of one request: what the used ring can tell the length of, with the status (VIRTIO 1.2, 2.7.8).
const DATA_BYTES_MAX: u64 = u32::MAX as u64 / SECTOR * SECTOR;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// In a range's flags, of writing zeroes alone: the zeros need not be stored.
const UNMAP: u32 = 1;

/// What the device is and what was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// Its size. A tail of less than a sector is out of reach.
    pub(super) capacity_sectors: u64,
    /// Nothing may change it.
    pub(super) read_only: bool,
    /// DISCARD was agreed on, within this.
    pub(super) discard: Option<RangesMax>,
    /// WRITE_ZEROES was agreed on, within this.
    pub(super) write_zeroes: Option<RangesMax>,
}

/// What one request of ranges may hold, as the configuration space says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RangesMax {
    /// Ranges.
    pub(super) ranges: u32,
    /// Sectors of each.
    pub(super) sectors: u32,
}

/// What a chain is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// To be done.
    Request(BlockRequest),
    /// To be answered with an error.
    Refused(Refusal),
}

/// What is to be done. Offsets and lengths are bytes, whole sectors inside the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read `len` bytes, which [`BlockRequest::scatter`] brings to the guest. Not zero.
    Read {
        /// From here.
        offset: u64,
        /// So many.
        len: u32,
    },
    /// Write `len` bytes, which [`BlockRequest::gather`] brings from the guest. As for reads.
    Write {
        /// From here.
        offset: u64,
        /// So many.
        len: u32,
    },
    /// Make durable what was acknowledged.
    Flush,
    /// Forget these (offset, length); none is empty.
    Discard {
        /// In the guest's order; they may overlap.
        ranges: Vec<(u64, u64)>,
    },
    /// Write zeros to these (offset, length, whether a hole will do); none is empty.
    WriteZeroes {
        /// In the guest's order; they may overlap.
        ranges: Vec<(u64, u64, bool)>,
    },
    /// Tell the first `len` bytes of the identification, by [`BlockRequest::scatter`].
    GetId {
        /// At most [`ID_BYTES`].
        len: u32,
    },
}

/// See the module's text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BlockRequest {
    /// Its place in the queue.
    pub(super) head: u16,
    /// What is to be done.
    pub(super) kind: Kind,
    chain: Chain,
    status_at: u64,
}

/// A request that is not done.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Its place in the queue.
    pub(super) head: u16,
    /// Why.
    pub(super) status: u8,
    status_at: u64,
    writable_bytes: u64,
}

impl Parsed {
    /// Reads the request of a head that was taken from `ring`.
    ///
    /// # Errors
    /// The chain cannot be followed, or has no place for a status: then no answer is possible.
    pub(super) fn read(memory: &GuestMemory, ring: &Ring, head: u16, rules: &Rules) -> Result<Self, Fault> {
        let chain = ring.chain(memory, head)?;
        let status_at = chain
            .last_writable()
            .ok_or(Fault::Chain("a request without a place for its status"))?;
        match judge(memory, &chain, rules)? {
            Ok(kind) => Ok(Self::Request(BlockRequest {
                head,
                kind,
                chain,
                status_at,
            })),
            Err(Status(status)) => Ok(Self::Refused(Refusal {
                head,
                status,
                status_at,
                writable_bytes: chain.writable_bytes(),
            })),
        }
    }
}

impl BlockRequest {
    /// Bytes of payload, either way.
    pub(super) fn data_len(&self) -> u32 {
        match self.kind {
            Kind::Read { len, .. } | Kind::Write { len, .. } | Kind::GetId { len } => len,
            Kind::Flush | Kind::Discard { .. } | Kind::WriteZeroes { .. } => 0,
        }
    }

    /// Parts of its chain: what it costs to follow it.
    pub(super) fn parts(&self) -> usize {
        self.chain.parts()
    }

    /// Copies a piece of a write's payload out of the guest, from its `from`th byte on.
    ///
    /// # Errors
    /// The memory has gone.
    ///
    /// # Panics
    /// The payload is not as long.
    pub(super) fn gather_from(&self, memory: &GuestMemory, from: usize, out: &mut [u8]) -> Result<(), Fault> {
        assert!(matches!(self.kind, Kind::Write { len, .. } if from + out.len() <= len as usize));
        self.chain.read(memory, (HEADER_BYTES + from) as u64, out)
    }

    /// Copies a write's payload out of the guest.
    ///
    /// # Errors
    /// The memory has gone.
    ///
    /// # Panics
    /// `out` is longer than the payload.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn gather(&self, memory: &GuestMemory, out: &mut [u8]) -> Result<(), Fault> {
        self.gather_from(memory, 0, out)
    }

    /// Copies bytes of the answer into the guest, to the `from`th place of it.
    ///
    /// # Errors
    /// The memory has gone.
    ///
    /// # Panics
    /// The answer is not as long.
    pub(super) fn scatter(
        &self,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
        from: usize,
        bytes: &[u8],
    ) -> Result<(), Fault> {
        assert!(matches!(self.kind, Kind::Read { .. } | Kind::GetId { .. }));
        assert!(from + bytes.len() <= self.data_len() as usize);
        self.chain.write(memory, log, from as u64, bytes)
    }

    /// Writes the status. Gives what the used ring says: how many bytes have been written, from the first one on. An answer
    /// that was asked for is taken to be there when all is well.
    ///
    /// # Errors
    /// The memory has gone.
    pub(super) fn finish(
        &self,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
        status: u8,
    ) -> Result<u32, Fault> {
        let answered = match self.kind {
            Kind::Read { len, .. } | Kind::GetId { len } if status == STATUS_OK => len,
            _ => 0,
        };
        memory.write(self.status_at, &[status], log)?;
        Ok(used_len(answered, self.chain.writable_bytes()))
    }
}

impl Refusal {
    /// Writes the status. Gives what the used ring says.
    ///
    /// # Errors
    /// The memory has gone.
    pub(super) fn finish(&self, memory: &GuestMemory, log: Option<&DirtyLog>) -> Result<u32, Fault> {
        memory.write(self.status_at, &[self.status], log)?;
        Ok(used_len(0, self.writable_bytes))
    }
}

/// How many bytes have been written without a gap, when these were and then the last one, the status.
fn used_len(answered: u32, writable_bytes: u64) -> u32 {
    match u64::from(answered) + 1 == writable_bytes {
        true => answered + 1,
        false => answered,
    }
}

/// The status that a request is refused with.
struct Status(u8);

const IOERR: Status = Status(STATUS_IOERR);
const UNSUPP: Status = Status(STATUS_UNSUPP);

/// Outside: the memory has gone. Inside: the guest gets an error.
fn judge(memory: &GuestMemory, chain: &Chain, rules: &Rules) -> Result<Result<Kind, Status>, Fault> {
    let Some(payload) = chain.readable_bytes().checked_sub(HEADER_BYTES as u64) else {
        return Ok(Err(IOERR));
    };
    let mut header = [0; HEADER_BYTES];
    chain.read(memory, 0, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    // There is a status, so at least one byte.
    let room = chain.writable_bytes() - 1;
    Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
        TYPE_IN => rules
            .range(sector, room)
            .map(|(offset, len)| Kind::Read { offset, len }),
        TYPE_OUT if rules.read_only => Err(IOERR),
        TYPE_OUT => rules
            .range(sector, payload)
            .map(|(offset, len)| Kind::Write { offset, len }),
        TYPE_FLUSH => Ok(Kind::Flush),
        TYPE_GET_ID => Ok(Kind::GetId {
            len: room.min(ID_BYTES as u64) as u32,
        }),
        TYPE_DISCARD => match rules.discard {
            None => Err(UNSUPP),
            Some(max) => ranges(memory, chain, payload, rules, max, 0)?.map(discard),
        },
        TYPE_WRITE_ZEROES => match rules.write_zeroes {
            None => Err(UNSUPP),
            Some(max) => ranges(memory, chain, payload, rules, max, UNMAP)?.map(write_zeroes),
        },
        _ => Err(UNSUPP),
    })
}

impl Rules {
    /// Data of one request: whole sectors, some, not too many, inside the device.
    fn range(&self, sector: u64, len: u64) -> Result<(u64, u32), Status> {
        if len == 0 || len > DATA_BYTES_MAX || !len.is_multiple_of(SECTOR) {
            return Err(IOERR);
        }
        let offset = self.offset(sector, len / SECTOR)?;
        Ok((offset, len as u32))
    }

    /// Where these sectors begin, if they are inside the device.
    fn offset(&self, sector: u64, sectors: u64) -> Result<u64, Status> {
        let end = sector.checked_add(sectors).ok_or(IOERR)?;
        if end > self.capacity_sectors {
            return Err(IOERR);
        }
        sector.checked_mul(SECTOR).ok_or(IOERR)
    }
}

/// Offset, length and flags of each range. Empty ones are dropped: there is nothing to do.
type Ranges = Vec<(u64, u64, u32)>;

fn ranges(
    memory: &GuestMemory,
    chain: &Chain,
    payload: u64,
    rules: &Rules,
    max: RangesMax,
    flags_allowed: u32,
) -> Result<Result<Ranges, Status>, Fault> {
    let count = payload / RANGE_BYTES as u64;
    let in_shape = payload.is_multiple_of(RANGE_BYTES as u64) && (1..=u64::from(max.ranges)).contains(&count);
    if rules.read_only || !in_shape {
        return Ok(Err(IOERR));
    }
    let mut bytes = vec![0; payload as usize];
    chain.read(memory, HEADER_BYTES as u64, &mut bytes)?;
    let mut ranges = Vec::new();
    for [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] in bytes.as_chunks().0 {
        let sector = u64::from_le_bytes([*s0, *s1, *s2, *s3, *s4, *s5, *s6, *s7]);
        let sectors = u32::from_le_bytes([*n0, *n1, *n2, *n3]);
        let flags = u32::from_le_bytes([*f0, *f1, *f2, *f3]);
        if flags & !flags_allowed != 0 {
            return Ok(Err(UNSUPP));
        }
        let offset = match rules.offset(sector, u64::from(sectors)) {
            Ok(offset) if sectors <= max.sectors => offset,
            _ => return Ok(Err(IOERR)),
        };
        if sectors > 0 {
            ranges.push((offset, u64::from(sectors) * SECTOR, flags));
        }
    }
    Ok(Ok(ranges))
}

fn discard(ranges: Ranges) -> Kind {
    let ranges = ranges.into_iter().map(|(offset, len, _)| (offset, len));
    Kind::Discard {
        ranges: ranges.collect(),
    }
}

fn write_zeroes(ranges: Ranges) -> Kind {
    let ranges = ranges
        .into_iter()
        .map(|(offset, len, flags)| (offset, len, flags & UNMAP != 0));
    Kind::WriteZeroes {
        ranges: ranges.collect(),
    }
}

#[cfg(test)]
mod tests;
