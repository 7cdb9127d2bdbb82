//! Requests of honest guests are read however they are cut up; those of hostile ones end in an error or a fault.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rustix::fs::ftruncate;

use super::*;
use crate::vhost::guest::{self, DATA, Guest, QUEUE, account, memfd};
use crate::vhost::mapping::Mapping;
use crate::vhost::memory::Region;

const SIZE: u16 = 64;
const HEADER: u64 = DATA;
const PAYLOAD: u64 = 0x2_0000;
const STATUS: u64 = 0x1_8000;
const MAX: RangesMax = RangesMax {
    ranges: 3,
    sectors: 1000,
};
const RULES: Rules = Rules {
    capacity_sectors: 2048,
    read_only: false,
    discard: Some(MAX),
    write_zeroes: Some(MAX),
};
const READ_ONLY: Rules = Rules {
    read_only: true,
    ..RULES
};

fn ring(guest: &Guest) -> Ring {
    Ring::new(SIZE, QUEUE, 0, false, &guest.memory).unwrap()
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    // Reserved, and ignored.
    bytes[4..8].copy_from_slice(&[0xff; 4]);
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A chain as drivers make it: header, payload either way, status.
fn lay_out(guest: &Guest, kind: u32, sector: u64, to_read: u32, to_write: u32) {
    guest.put(HEADER, &header(kind, sector));
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend((to_read > 0).then_some((PAYLOAD, to_read, false)));
    parts.extend((to_write > 0).then_some((PAYLOAD, to_write, true)));
    parts.push((STATUS, 1, true));
    guest.chain(QUEUE.desc, 0, &parts);
}

fn read(guest: &Guest, rules: &Rules) -> Result<Parsed, Fault> {
    Parsed::read(&guest.memory, &ring(guest), 0, rules)
}

fn request(guest: &Guest) -> BlockRequest {
    match read(guest, &RULES) {
        Ok(Parsed::Request(request)) => request,
        other => panic!("{other:?}"),
    }
}

/// The status that a request is refused with, as the guest finds it.
fn refused_by(guest: &Guest, rules: &Rules) -> u8 {
    guest.put(STATUS, &[0xaa]);
    match read(guest, rules) {
        Ok(Parsed::Refused(refusal)) => {
            let len = refusal.finish(&guest.memory, None).unwrap();
            let alone = refusal.writable_bytes == 1;
            assert_eq!(len, u32::from(alone), "no gap is called written");
            guest.get(STATUS, 1)[0]
        }
        other => panic!("{other:?}"),
    }
}

fn refused(guest: &Guest) -> u8 {
    refused_by(guest, &RULES)
}

#[test]
fn a_read_brings_bytes_to_the_guest_and_says_how_many() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_IN, 3, 0, 1024);
    let request = request(&guest);
    assert_eq!(
        request.kind,
        Kind::Read {
            offset: 1536,
            len: 1024
        }
    );
    request.scatter(&guest.memory, None, 0, &[7; 600]).unwrap();
    request.scatter(&guest.memory, None, 600, &[8; 424]).unwrap();
    assert_eq!(
        guest.get(PAYLOAD, 1025),
        [vec![7; 600], vec![8; 424], vec![0]].concat()
    );
    guest.put(STATUS, &[0xaa]);
    assert_eq!(request.finish(&guest.memory, None, STATUS_OK), Ok(1025));
    assert_eq!(guest.get(STATUS, 1), [STATUS_OK]);
    // Of one that has failed nothing is called written.
    assert_eq!(request.finish(&guest.memory, None, STATUS_IOERR), Ok(0));
    assert_eq!(guest.get(STATUS, 1), [STATUS_IOERR]);
}

#[test]
fn a_write_takes_bytes_from_the_guest() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_OUT, 2047, 512, 0);
    guest.put(PAYLOAD, &[9; 512]);
    let request = request(&guest);
    assert_eq!(
        request.kind,
        Kind::Write {
            offset: 2047 * 512,
            len: 512
        }
    );
    let mut out = [0; 512];
    request.gather(&guest.memory, &mut out).unwrap();
    assert_eq!(out, [9; 512]);
    assert_eq!(request.finish(&guest.memory, None, STATUS_OK), Ok(1));
}

#[test]
fn a_flush_and_the_identification() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_FLUSH, 0, 0, 0);
    assert_eq!(request(&guest).kind, Kind::Flush);
    assert!(matches!(read(&guest, &READ_ONLY), Ok(Parsed::Request(_))));
    for (room, len, used) in [(20, 20, 21), (1, 1, 2), (0, 0, 1), (100, 20, 20)] {
        lay_out(&guest, TYPE_GET_ID, 0, 0, room);
        let request = request(&guest);
        assert_eq!(request.kind, Kind::GetId { len });
        request
            .scatter(&guest.memory, None, 0, &vec![b'x'; len as usize])
            .unwrap();
        assert_eq!(request.finish(&guest.memory, None, STATUS_OK), Ok(used));
    }
}

#[test]
fn ranges_to_discard_and_to_write_zeroes_to() {
    let guest = Guest::simple();
    guest.put(
        PAYLOAD,
        &[range(0, 1000, 0), range(5, 0, 0), range(2047, 1, 0)].concat(),
    );
    lay_out(&guest, TYPE_DISCARD, 0, 48, 0);
    let ranges = vec![(0, 512_000), (2047 * 512, 512)];
    assert_eq!(request(&guest).kind, Kind::Discard { ranges });
    guest.put(
        PAYLOAD,
        &[range(8, 8, UNMAP), range(2048, 0, 0), range(8, 8, 0)].concat(),
    );
    lay_out(&guest, TYPE_WRITE_ZEROES, 0, 48, 0);
    let ranges = vec![(4096, 4096, true), (4096, 4096, false)];
    assert_eq!(request(&guest).kind, Kind::WriteZeroes { ranges });
}

#[test]
fn sectors_past_the_capacity_or_that_wrap_are_an_error() {
    let guest = Guest::simple();
    for sector in [2047, 2048, 1 << 55, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
        lay_out(&guest, TYPE_IN, sector, 0, 1024);
        assert_eq!(refused(&guest), STATUS_IOERR, "{sector}");
        lay_out(&guest, TYPE_OUT, sector, 1024, 0);
        assert_eq!(refused(&guest), STATUS_IOERR, "{sector}");
    }
    lay_out(&guest, TYPE_IN, 2046, 0, 1024);
    request(&guest);
    // However large the device says it is.
    let endless = Rules {
        capacity_sectors: u64::MAX,
        ..RULES
    };
    lay_out(&guest, TYPE_IN, u64::MAX - 2, 0, 1024);
    assert_eq!(refused_by(&guest, &endless), STATUS_IOERR);
}

#[test]
fn lengths_that_are_no_whole_sectors_or_none_or_too_many_are_an_error() {
    let guest = Guest::simple();
    for len in [0, 1, 511, 513, 1023] {
        lay_out(&guest, TYPE_IN, 0, 0, len);
        assert_eq!(refused(&guest), STATUS_IOERR, "{len}");
        lay_out(&guest, TYPE_OUT, 0, len, 0);
        assert_eq!(refused(&guest), STATUS_IOERR, "{len}");
    }
    let large = Guest::new(&[(0, 8 << 30)]);
    let endless = Rules {
        capacity_sectors: u64::MAX,
        ..RULES
    };
    let most = u32::MAX - 511;
    for len in [most - 1, u32::MAX] {
        lay_out(&large, TYPE_IN, 0, 0, len);
        assert_eq!(refused_by(&large, &endless), STATUS_IOERR, "{len}");
        lay_out(&large, TYPE_OUT, 0, len, 0);
        assert_eq!(refused_by(&large, &endless), STATUS_IOERR, "{len}");
    }
    // 4 GiB in two parts, so that 32 bits would say nothing.
    large.put(HEADER, &header(TYPE_IN, 0));
    large.chain(
        QUEUE.desc,
        0,
        &[
            (HEADER, 16, false),
            (PAYLOAD, 1 << 31, true),
            (PAYLOAD, 1 << 31, true),
            (PAYLOAD, 512, true),
            (STATUS, 1, true),
        ],
    );
    assert_eq!(refused_by(&large, &endless), STATUS_IOERR);
    lay_out(&large, TYPE_IN, 0, 0, most);
    assert!(matches!(read(&large, &endless), Ok(Parsed::Request(_))));
}

#[test]
fn a_device_that_is_read_only_is_not_changed() {
    let guest = Guest::simple();
    guest.put(PAYLOAD, &range(0, 1, 0));
    for (kind, len) in [(TYPE_OUT, 512), (TYPE_DISCARD, 16), (TYPE_WRITE_ZEROES, 16)] {
        lay_out(&guest, kind, 0, len, 0);
        assert_eq!(refused_by(&guest, &READ_ONLY), STATUS_IOERR, "{kind}");
        request(&guest);
    }
    lay_out(&guest, TYPE_IN, 0, 0, 512);
    assert!(matches!(read(&guest, &READ_ONLY), Ok(Parsed::Request(_))));
}

#[test]
fn a_type_that_is_unknown_or_was_not_agreed_on_is_unsupported() {
    let guest = Guest::simple();
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0000, u32::MAX] {
        lay_out(&guest, kind, 0, 512, 512);
        assert_eq!(refused(&guest), STATUS_UNSUPP, "{kind}");
    }
    let neither = Rules {
        discard: None,
        write_zeroes: None,
        ..RULES
    };
    guest.put(PAYLOAD, &range(0, 1, 0));
    for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
        lay_out(&guest, kind, 0, 16, 0);
        assert_eq!(refused_by(&guest, &neither), STATUS_UNSUPP);
    }
}

#[test]
fn ranges_outside_the_device_too_many_or_of_a_wrong_form_are_an_error() {
    let guest = Guest::simple();
    let one = range(0, 1, 0);
    for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
        for (ranges, why) in [
            (range(2048, 1, 0), "past the capacity"),
            (range(2047, 2, 0), "over the capacity"),
            (range(2049, 0, 0), "nothing, past the capacity"),
            (range(u64::MAX, 1, 0), "a sum that wraps"),
            (range(u64::MAX, u32::MAX, 0), "a sum that wraps"),
            (range(u64::MAX / 512 + 1, 1, 0), "an offset that wraps"),
            (range(0, 1001, 0), "longer than is allowed"),
            (range(0, u32::MAX, 0), "longer than is allowed"),
            ([&one[..], &range(2048, 1, 0)].concat(), "the second of two"),
            (one.repeat(4), "too many"),
            (vec![], "none"),
            (one[..15].to_vec(), "less than one"),
            ([&one[..], &[0]].concat(), "more than one"),
        ] {
            guest.put(PAYLOAD, &ranges);
            lay_out(&guest, kind, 0, ranges.len() as u32, 0);
            assert_eq!(refused(&guest), STATUS_IOERR, "{kind}: {why}");
        }
        for flags in [2, 3, 0x8000_0000, u32::MAX] {
            guest.put(PAYLOAD, &range(0, 1, flags));
            lay_out(&guest, kind, 0, 16, 0);
            assert_eq!(refused(&guest), STATUS_UNSUPP, "{kind}: {flags:#x}");
        }
    }
    guest.put(PAYLOAD, &range(0, 1, UNMAP));
    lay_out(&guest, TYPE_DISCARD, 0, 16, 0);
    assert_eq!(refused(&guest), STATUS_UNSUPP);
}

#[test]
fn a_header_that_is_cut_short_is_an_error_and_a_status_without_a_place_a_fault() {
    let guest = Guest::simple();
    for len in [0, 1, 15] {
        guest.chain(QUEUE.desc, 0, &[(HEADER, len, false), (STATUS, 1, true)]);
        assert_eq!(refused(&guest), STATUS_IOERR);
    }
    guest.chain(QUEUE.desc, 0, &[(STATUS, 1, true)]);
    assert_eq!(refused(&guest), STATUS_IOERR);
    for parts in [
        &[(HEADER, 16, false)][..],
        &[(HEADER, 16, false), (PAYLOAD, 512, false)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(HEADER, 0, false)],
    ] {
        guest.chain(QUEUE.desc, 0, parts);
        let fault = Fault::Chain("a request without a place for its status");
        assert_eq!(read(&guest, &RULES), Err(fault), "{parts:?}");
    }
}

#[test]
fn a_status_may_share_its_part_with_data_and_data_its_part_with_the_header() {
    let guest = Guest::simple();
    guest.put(HEADER, &header(TYPE_IN, 1));
    guest.chain(QUEUE.desc, 0, &[(HEADER, 16, false), (PAYLOAD, 513, true)]);
    let reading = request(&guest);
    assert_eq!(
        reading.kind,
        Kind::Read {
            offset: 512,
            len: 512
        }
    );
    reading.scatter(&guest.memory, None, 0, &[5; 512]).unwrap();
    assert_eq!(reading.finish(&guest.memory, None, STATUS_OK), Ok(513));
    assert_eq!(guest.get(PAYLOAD, 513), [vec![5; 512], vec![STATUS_OK]].concat());
    guest.put(HEADER, &header(TYPE_OUT, 1));
    guest.put(HEADER + 16, &[6; 512]);
    guest.chain(QUEUE.desc, 0, &[(HEADER, 528, false), (STATUS, 1, true)]);
    let writing = request(&guest);
    let mut out = [0; 512];
    writing.gather(&guest.memory, &mut out).unwrap();
    assert_eq!(out, [6; 512]);
}

#[test]
fn descriptors_and_header_that_change_during_the_request_change_nothing() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_OUT, 1, 512, 0);
    guest.put(PAYLOAD, &[1; 512]);
    let request = request(&guest);
    guest.put(HEADER, &header(TYPE_IN, u64::MAX));
    for i in 0..SIZE {
        guest.descriptor(QUEUE.desc, i, (u64::MAX, u32::MAX), u16::MAX, i);
    }
    let mut out = [0; 512];
    request.gather(&guest.memory, &mut out).unwrap();
    assert_eq!(
        (out, request.finish(&guest.memory, None, STATUS_OK)),
        ([1; 512], Ok(1))
    );
    assert_eq!(guest.get(STATUS, 1), [STATUS_OK]);
}

#[test]
fn a_guest_that_scribbles_over_everything_gets_requests_inside_the_device_or_none() {
    let guest = Guest::simple();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (fd, done) = (&guest.fd, &done);
        scope.spawn(move || {
            let memory = Mapping::new(&account(), fd, 0, guest::END as usize).unwrap();
            let values = [0, 1, 2, 3, 4, 7, 16, 512, 0x8000, 0xffff];
            let mut chance = 1_u64;
            while !done.load(Ordering::Relaxed) {
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let pick = (chance >> 33) as usize;
                // Lengths, flags and links of the first descriptors; type and sector.
                let at = match pick % 3 {
                    0 => QUEUE.desc as usize + 16 * (pick / 8 % 6) + 8 + 2 * (pick / 64 % 4),
                    1 => QUEUE.desc as usize + 2 * (pick / 8 % 48),
                    _ => HEADER as usize + 2 * (pick / 8 % 8),
                };
                memory.store_u16(at, values[pick / 512 % values.len()]).unwrap();
            }
        });
        let (mut requests, mut refusals, mut faults) = (0, 0, 0);
        // Until each kind of end has been seen, and many of them.
        for round in 0_u64.. {
            if round % 8 == 0 {
                lay_out(
                    &guest,
                    [TYPE_IN, TYPE_OUT][(round / 8 % 2) as usize],
                    5,
                    512 * (round as u32 / 8 % 2),
                    512,
                );
            }
            match read(&guest, &RULES) {
                Ok(Parsed::Request(request)) => {
                    requests += 1;
                    if let Kind::Read { offset, len } | Kind::Write { offset, len } = request.kind {
                        assert!(len > 0 && len % 512 == 0 && offset + u64::from(len) <= 2048 * 512);
                    }
                    let mut bytes = vec![0; request.data_len() as usize];
                    match request.kind {
                        Kind::Write { .. } => request.gather(&guest.memory, &mut bytes).unwrap(),
                        Kind::Read { .. } | Kind::GetId { .. } => {
                            request.scatter(&guest.memory, None, 0, &bytes).unwrap();
                        }
                        _ => {}
                    }
                    request.finish(&guest.memory, None, STATUS_OK).unwrap();
                }
                Ok(Parsed::Refused(refusal)) => {
                    refusals += 1;
                    refusal.finish(&guest.memory, None).unwrap();
                }
                Err(_) => faults += 1,
            }
            if round >= 20_000 && requests > 0 && refusals > 0 && faults > 0 {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_request_whose_region_is_removed_ends_and_one_whose_memory_is_cut_off_is_told() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_OUT, 1, 512, 0);
    let request = request(&guest);
    let region = Region {
        guest: 0,
        user: guest::USER,
        len: guest::END,
        offset: 0,
    };
    let rest = guest.memory.without(&region).unwrap();
    // Those that begin now have no memory; this one goes on with that which it began with.
    assert!(Parsed::read(&rest, &ring(&guest), 0, &RULES).is_err());
    request.gather(&guest.memory, &mut [0; 512]).unwrap();
    ftruncate(&guest.fd, DATA).unwrap();
    assert_eq!(request.gather(&guest.memory, &mut [0; 512]), Err(Fault::Gone));
    assert_eq!(request.finish(&guest.memory, None, STATUS_OK), Err(Fault::Gone));
    assert!(guest.memory.is_broken());
}

#[test]
fn answer_and_status_are_logged() {
    let guest = Guest::simple();
    lay_out(&guest, TYPE_IN, 0, 0, 512);
    let fd = memfd(4096);
    let log = DirtyLog::new(&account(), &fd, 0, 32).unwrap();
    let request = request(&guest);
    request.scatter(&guest.memory, Some(&log), 0, &[1; 512]).unwrap();
    request.finish(&guest.memory, Some(&log), STATUS_OK).unwrap();
    let bits = Mapping::new(&account(), &fd, 0, 32).unwrap();
    let marked: Vec<usize> = (0..32 * 8)
        .filter(|page| bits.load_u8(page / 8).unwrap() >> (page % 8) & 1 == 1)
        .collect();
    assert_eq!(marked, [(STATUS / 4096) as usize, (PAYLOAD / 4096) as usize]);
}

/// Cuts so many bytes into parts, one behind the other with gaps.
fn cut(at: u64, len: usize, cuts: &[usize], writable: bool) -> Vec<(u64, u32, bool)> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).collect();
    ends.push(len);
    ends.sort_unstable();
    let mut begin = 0;
    let mut place = at;
    let mut parts = Vec::new();
    for end in ends {
        parts.push((place, (end - begin) as u32, writable));
        place += (end - begin) as u64 + 3;
        begin = end;
    }
    parts
}

fn put_parts(guest: &Guest, parts: &[(u64, u32, bool)], mut bytes: &[u8]) {
    for (at, len, _) in parts {
        let (here, rest) = bytes.split_at(*len as usize);
        guest.put(*at, here);
        bytes = rest;
    }
}

fn get_parts(guest: &Guest, parts: &[(u64, u32, bool)]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|(at, len, _)| guest.get(*at, *len as usize))
        .collect()
}

proptest! {
    #[test]
    fn a_request_is_the_same_however_it_is_cut_up(
        sectors in 1..4_usize,
        writing in any::<bool>(),
        indirect in any::<bool>(),
        single_bytes in any::<bool>(),
        to_read in prop::collection::vec(any::<usize>(), 0..12),
        to_write in prop::collection::vec(any::<usize>(), 0..12),
        seed in any::<u8>(),
    ) {
        let guest = Guest::simple();
        let data: Vec<u8> = (0..sectors * 512).map(|i| (i / 7) as u8 ^ seed).collect();
        let kind = if writing { TYPE_OUT } else { TYPE_IN };
        let mut readable = header(kind, 9).to_vec();
        let mut room = 1;
        if writing { readable.extend(&data) } else { room += data.len() }
        // Up to the header's end, each byte a part of its own.
        let to_read: Vec<usize> = if single_bytes { (0..20).collect() } else { to_read };
        let readable_parts = cut(DATA, readable.len(), &to_read, false);
        let writable_parts = cut(PAYLOAD + 1, room, &to_write, true);
        put_parts(&guest, &readable_parts, &readable);
        let parts = [&readable_parts[..], &writable_parts].concat();
        if indirect {
            guest.chain(0x4_0001, 0, &parts);
            guest.descriptor(QUEUE.desc, 0, (0x4_0001, 16 * parts.len() as u32), guest::INDIRECT, 0);
        } else {
            guest.chain(QUEUE.desc, 0, &parts);
        }
        let request = request(&guest);
        let (offset, len) = (9 * 512, data.len() as u32);
        if writing {
            prop_assert_eq!(&request.kind, &Kind::Write { offset, len });
            let mut out = vec![0; data.len()];
            request.gather(&guest.memory, &mut out).unwrap();
            prop_assert_eq!(&out, &data);
            prop_assert_eq!(request.finish(&guest.memory, None, STATUS_UNSUPP), Ok(1));
            prop_assert_eq!(get_parts(&guest, &writable_parts), [STATUS_UNSUPP]);
        } else {
            prop_assert_eq!(&request.kind, &Kind::Read { offset, len });
            let middle = data.len() / 3;
            request.scatter(&guest.memory, None, middle, &data[middle..]).unwrap();
            request.scatter(&guest.memory, None, 0, &data[..middle]).unwrap();
            prop_assert_eq!(request.finish(&guest.memory, None, STATUS_OK), Ok(len + 1));
            prop_assert_eq!(get_parts(&guest, &writable_parts), [&data[..], &[STATUS_OK]].concat());
        }
    }
}
