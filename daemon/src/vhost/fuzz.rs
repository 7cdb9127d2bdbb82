//! Fuzz target: a guest's memory, queue included, is all the fuzzer's. Every request in it is read twice, here once more from
//! a copy and in the plainest way, and both must agree; so must the memory after it was answered, and the log of it.
//!
//! An input's first eight bytes: the queue size (two to the power of the first, modulo 5); the flags below; the capacity in
//! sectors (2 bytes); the base (2 bytes); the status that requests end with; nothing. The rest is the memory from
//! [`QUEUE`]'s descriptor table on: two regions side by side and one apart, of a page each.

use super::guest::{Guest, INDIRECT, NEXT, WRITE, account, memfd};
use super::mapping::Mapping;
use super::memory::DirtyLog;
use super::request::{Kind, Parsed, RangesMax, Rules, STATUS_OK};
use super::ring::{Ring, RingAddresses};

const EVENT_IDX: u8 = 1;
const READ_ONLY: u8 = 2;
const DISCARD: u8 = 4;
const WRITE_ZEROES: u8 = 8;
const LOG: u8 = 16;
const LOG_USED: u8 = 32;
const ODD_BASE: u8 = 64;

const PAGE: u64 = 4096;
const REGIONS: [(u64, u64); 3] = [(0x1000, PAGE), (0x2000, PAGE), (0x8000, PAGE)];
const QUEUE: RingAddresses = RingAddresses {
    desc: 0x1000,
    avail: 0x1100,
    used: 0x1200,
    log_used: None,
};
/// The used ring's page in the log.
const LOG_USED_AT: u64 = 0x5000;
const MAX: RangesMax = RangesMax {
    ranges: 4,
    sectors: 500,
};
/// Requests of one input.
const ROUNDS: usize = 64;

/// See the module's text. Gives how many requests were answered.
pub(crate) fn walk(input: &[u8]) -> usize {
    let Some(([size, flags, c0, c1, b0, b1, status, _], image)) = input.split_first_chunk() else {
        return 0;
    };
    let set = |flag| flags & flag != 0;
    let guest = Guest::new(&REGIONS);
    let mut model = Model {
        bytes: vec![0; REGIONS.len() * PAGE as usize],
        size: 1 << (size % 5),
        pages: 0,
        log_used: set(LOG_USED),
    };
    let image = &image[..image.len().min(model.bytes.len())];
    model.bytes[..image.len()].copy_from_slice(image);
    for (i, (at, len)) in REGIONS.iter().enumerate() {
        guest.put(*at, &model.bytes[i * PAGE as usize..][..*len as usize]);
    }
    let rules = Rules {
        capacity_sectors: u16::from_le_bytes([*c0, *c1]).into(),
        read_only: set(READ_ONLY),
        discard: set(DISCARD).then_some(MAX),
        write_zeroes: set(WRITE_ZEROES).then_some(MAX),
    };
    let log_fd = memfd(PAGE);
    let log = set(LOG).then(|| DirtyLog::new(&account(), &log_fd, 0, 2).expect("a log of 16 pages"));
    let base = match set(ODD_BASE) {
        true => u16::from_le_bytes([*b0, *b1]),
        false => model.u16(QUEUE.used + 2),
    };
    let addresses = RingAddresses {
        log_used: set(LOG_USED).then_some(LOG_USED_AT),
        ..QUEUE
    };
    let ring = Ring::new(model.size, addresses, base, set(EVENT_IDX), &guest.memory);
    let begun = model.u16(QUEUE.used + 2);
    let mut answered = 0;
    if let Ok(mut ring) = ring {
        run(
            &guest,
            &mut ring,
            &mut model,
            &rules,
            log.as_ref(),
            *status,
            set(EVENT_IDX),
        );
        answered = ring.used_index().wrapping_sub(begun);
    }
    model.compare(&guest);
    let bits = Mapping::new(&account(), &log_fd, 0, 2).expect("it was mapped before");
    let logged = bits.load_u16(0).map(u16::from_le);
    assert_eq!(logged, Ok(if log.is_some() { model.pages } else { 0 }), "the log");
    answered.into()
}

fn run(
    guest: &Guest,
    ring: &mut Ring,
    model: &mut Model,
    rules: &Rules,
    log: Option<&DirtyLog>,
    status: u8,
    event_idx: bool,
) {
    let memory = &guest.memory;
    for round in 0..ROUNDS {
        let place = ring.base() % model.size;
        match ring.next(memory) {
            Err(_) => return,
            Ok(None) => {
                let Ok(more) = ring.ask_for_kicks(memory, log) else {
                    return;
                };
                let entries = u64::from(model.size);
                match event_idx {
                    true => model.put_used(4 + 8 * entries, &ring.base().to_le_bytes()),
                    false => model.put_used(0, &[0, 0]),
                }
                if !more {
                    return;
                }
            }
            Ok(Some(head)) => {
                assert_eq!(head, model.u16(QUEUE.avail + 4 + 2 * u64::from(place)));
                let Some(used_len) = answer(guest, ring, model, rules, log, status, head) else {
                    return;
                };
                let index = ring.used_index();
                ring.push_used(memory, log, head, used_len)
                    .expect("the ring is there");
                let entry = 4 + 8 * u64::from(index % model.size);
                model.put_used(entry, &u32::from(head).to_le_bytes());
                model.put_used(entry + 4, &used_len.to_le_bytes());
                model.put_used(2, &index.wrapping_add(1).to_le_bytes());
                if round % 3 == 0 {
                    ring.wants_call(memory).expect("the ring is there");
                }
            }
        }
        model.compare(guest);
    }
}

/// Reads and answers one request, in both ways. `None`: it cannot be answered.
fn answer(
    guest: &Guest,
    ring: &Ring,
    model: &mut Model,
    rules: &Rules,
    log: Option<&DirtyLog>,
    status: u8,
    head: u16,
) -> Option<u32> {
    let memory = &guest.memory;
    let expected = model.expect(head, rules);
    match (Parsed::read(memory, ring, head, rules), expected) {
        (Err(_), None) => None,
        (Ok(Parsed::Refused(refusal)), Some((Err(status), chain))) => {
            assert_eq!((refusal.head, refusal.status), (head, status));
            let used_len = refusal.finish(memory, log).expect("the memory is there");
            Some(model.finish(&chain, 0, status, used_len))
        }
        (Ok(Parsed::Request(request)), Some((Ok(kind), chain))) => {
            assert_eq!((request.head, &request.kind), (head, &kind));
            let len = request.data_len() as usize;
            let mut answered = 0;
            match kind {
                Kind::Write { .. } => {
                    let mut bytes = vec![0; len];
                    request.gather(memory, &mut bytes).expect("the memory is there");
                    let places = &chain.readable[16..];
                    let payload = places.iter().map(|place| model.bytes[usize::from(*place)]);
                    assert!(payload.eq(bytes), "the payload of {request:?}");
                }
                Kind::Read { .. } | Kind::GetId { .. } => {
                    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
                    let (first, second) = bytes.split_at(len / 3);
                    request
                        .scatter(memory, log, 0, first)
                        .expect("the memory is there");
                    request
                        .scatter(memory, log, first.len(), second)
                        .expect("the memory is there");
                    for (place, byte) in chain.writable.iter().zip(&bytes) {
                        model.put(*place, *byte);
                    }
                    answered = if status == STATUS_OK { len } else { 0 };
                }
                Kind::Flush | Kind::Discard { .. } | Kind::WriteZeroes { .. } => {}
            }
            let used_len = request.finish(memory, log, status).expect("the memory is there");
            Some(model.finish(&chain, answered, status, used_len))
        }
        (read, expected) => panic!("{read:?}, where {:?} is right", expected.map(|(kind, _)| kind)),
    }
}

/// The guest's memory as plain bytes.
struct Model {
    bytes: Vec<u8>,
    size: u16,
    /// Pages that were written, a bit each.
    pages: u16,
    log_used: bool,
}

/// Where each byte of a chain is.
#[derive(Default)]
struct Places {
    readable: Vec<u16>,
    writable: Vec<u16>,
}

impl Model {
    /// Where in the bytes an address is.
    fn place(at: u128) -> Option<u16> {
        match at {
            0x1000..0x3000 => Some(at as u16 - 0x1000),
            0x8000..0x9000 => Some(at as u16 - 0x6000),
            _ => None,
        }
    }

    fn places(at: u64, len: u64) -> Option<Vec<u16>> {
        if len > 2 * PAGE {
            return None;
        }
        (0..u128::from(len))
            .map(|i| Self::place(u128::from(at) + i))
            .collect()
    }

    fn number(&self, places: &[u16]) -> u64 {
        let byte = |place: &u16| u64::from(self.bytes[usize::from(*place)]);
        places
            .iter()
            .rev()
            .fold(0, |number, place| number << 8 | byte(place))
    }

    fn u16(&self, at: u64) -> u16 {
        self.number(&Self::places(at, 2).expect("of the queue")) as u16
    }

    fn put(&mut self, place: u16, byte: u8) {
        self.bytes[usize::from(place)] = byte;
        let page = if place < 0x2000 { place / 0x1000 + 1 } else { 8 };
        self.pages |= 1 << page;
    }

    /// The used ring is logged elsewhere, if at all.
    fn put_used(&mut self, offset: u64, bytes: &[u8]) {
        let start = (QUEUE.used + offset - 0x1000) as usize;
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        if self.log_used {
            self.pages |= 1 << (LOG_USED_AT / PAGE);
        }
    }

    fn compare(&self, guest: &Guest) {
        for (i, (at, len)) in REGIONS.iter().enumerate() {
            let is = guest.get(*at, *len as usize);
            assert!(
                is == self.bytes[i * PAGE as usize..][..is.len()],
                "the memory from {at:#x} on"
            );
        }
    }

    fn finish(&mut self, chain: &Places, answered: usize, status: u8, used_len: u32) -> u32 {
        self.put(*chain.writable.last().expect("the status"), status);
        let all = chain.writable.len();
        let right = if answered + 1 == all { all } else { answered };
        assert_eq!(used_len as usize, right, "the length in the used ring");
        used_len
    }

    /// All of a chain, or `None` if it is wrong.
    fn chain(&self, head: u16) -> Option<Places> {
        let mut places = Places::default();
        let (mut table, mut size, mut index) = (QUEUE.desc, u64::from(self.size), u64::from(head));
        let (mut seen, mut nested, mut written) = (Vec::new(), false, false);
        loop {
            if index >= size || seen.contains(&index) {
                return None;
            }
            seen.push(index);
            let descriptor = Self::places(table + 16 * index, 16)?;
            let at = self.number(&descriptor[..8]);
            let len = self.number(&descriptor[8..12]);
            let flags = self.number(&descriptor[12..14]) as u16;
            if flags & INDIRECT != 0 {
                if nested || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
                    return None;
                }
                Self::places(at, len)?;
                (table, size, index) = (at, len / 16, 0);
                (seen, nested) = (Vec::new(), true);
                continue;
            }
            let bytes = Self::places(at, len)?;
            if flags & WRITE != 0 {
                written |= len > 0;
                places.writable.extend(bytes);
            } else if written {
                return None;
            } else {
                places.readable.extend(bytes);
            }
            if flags & NEXT == 0 {
                return Some(places);
            }
            index = self.number(&descriptor[14..]);
        }
    }

    /// What a chain asks for, or the status that it is refused with; `None` if there is no answer.
    fn expect(&self, head: u16, rules: &Rules) -> Option<(Result<Kind, u8>, Places)> {
        let chain = self.chain(head)?;
        let room = chain.writable.len().checked_sub(1)?;
        let kind = self.judge(&chain.readable, room as u128, rules);
        Some((kind, chain))
    }

    fn judge(&self, readable: &[u16], room: u128, rules: &Rules) -> Result<Kind, u8> {
        if readable.len() < 16 {
            return Err(1);
        }
        let sector = u128::from(self.number(&readable[8..16]));
        let capacity = u128::from(rules.capacity_sectors);
        let payload = &readable[16..];
        let data = |len: u128| {
            let good =
                len > 0 && len < 1 << 32 && len.is_multiple_of(512) && sector * 512 + len <= capacity * 512;
            if good {
                Ok((sector as u64 * 512, len as u32))
            } else {
                Err(1)
            }
        };
        let ranges = |max: Option<RangesMax>, flags_allowed: u64| {
            let max = max.ok_or(2)?;
            let count = payload.len() / 16;
            if rules.read_only
                || !payload.len().is_multiple_of(16)
                || count == 0
                || count > max.ranges as usize
            {
                return Err(1);
            }
            let mut ranges = Vec::new();
            for range in payload.chunks(16) {
                let sector = u128::from(self.number(&range[..8]));
                let sectors = u128::from(self.number(&range[8..12]));
                let flags = self.number(&range[12..]);
                if flags & !flags_allowed != 0 {
                    return Err(2);
                }
                if sector + sectors > capacity || sectors > u128::from(max.sectors) {
                    return Err(1);
                }
                if sectors > 0 {
                    ranges.push((sector as u64 * 512, sectors as u64 * 512, flags == 1));
                }
            }
            Ok(ranges)
        };
        match self.number(&readable[..4]) {
            0 => data(room).map(|(offset, len)| Kind::Read { offset, len }),
            1 if rules.read_only => Err(1),
            1 => data(payload.len() as u128).map(|(offset, len)| Kind::Write { offset, len }),
            4 => Ok(Kind::Flush),
            8 => Ok(Kind::GetId {
                len: room.min(20) as u32,
            }),
            11 => ranges(rules.discard, 0).map(|ranges| Kind::Discard {
                ranges: ranges.into_iter().map(|(offset, len, _)| (offset, len)).collect(),
            }),
            13 => ranges(rules.write_zeroes, 1).map(|ranges| Kind::WriteZeroes { ranges }),
            _ => Err(2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::walk;

    #[test]
    fn the_seeds_hold_requests_that_are_answered() {
        for (seed, answered) in [
            ("direct", 4),
            ("indirect", 4),
            ("direct-ranges", 2),
            ("indirect-ranges", 2),
            ("cut-up", 3),
            ("refused", 4),
            ("wrong", 1),
            ("read-only", 3),
        ] {
            let path = format!(
                "{}/../tests/fuzz/seeds/virtqueue/{seed}",
                env!("CARGO_MANIFEST_DIR")
            );
            let input = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            assert_eq!(walk(&input), answered, "{seed}");
        }
    }
}
