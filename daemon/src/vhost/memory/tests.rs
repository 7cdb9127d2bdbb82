//! Guest addresses lead to the guest's memory or nowhere.

use proptest::prelude::*;
use rustix::fs::ftruncate;

use super::*;
use crate::vhost::guest::{Guest, USER, account, memfd};

const PAGE: u64 = 4096;

fn region(guest: u64, len: u64, offset: u64) -> Region {
    Region {
        guest,
        user: guest.wrapping_add(USER),
        len,
        offset,
    }
}

fn refused(regions: &[Region], file: u64) -> String {
    let fd = memfd(file);
    let regions = regions.iter().map(|region| (*region, fd.try_clone().unwrap()));
    match GuestMemory::set(&account(), regions.collect()) {
        Ok(_) => panic!("taken"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_region_that_is_empty_wraps_overlaps_or_is_longer_than_its_file_is_refused() {
    for (regions, why) in [
        (vec![region(0, 0, 0)], "a memory region of no bytes"),
        (
            vec![region(u64::MAX - PAGE + 1, PAGE, 0)],
            "a memory region beyond the last guest address",
        ),
        (
            vec![Region {
                user: u64::MAX - 1,
                ..region(0, PAGE, 0)
            }],
            "a memory region beyond the last user address",
        ),
        (
            vec![region(0, PAGE, 8 * PAGE)],
            "memory that goes beyond the end of its file",
        ),
        (
            vec![region(0, PAGE, u64::MAX - 5)],
            "memory that goes beyond the end of its file",
        ),
        (
            vec![region(0, 9 * PAGE, 0)],
            "memory that goes beyond the end of its file",
        ),
        (
            vec![region(0, VHOST_MEMORY_BYTES_MAX + 1, 0)],
            "more guest memory than is supported",
        ),
        (
            vec![region(0, PAGE, 0), region(PAGE - 1, PAGE, 0)],
            "memory regions overlap",
        ),
        (
            vec![region(PAGE, PAGE, 0), region(1, PAGE, 0)],
            "memory regions overlap",
        ),
        (
            vec![region(PAGE, PAGE, 0), region(0, 8 * PAGE, 0)],
            "memory regions overlap",
        ),
        (
            vec![region(0, 8 * PAGE, 0), region(PAGE, PAGE, 0)],
            "memory regions overlap",
        ),
        (
            vec![region(PAGE, PAGE, 0), region(PAGE, PAGE, 0)],
            "memory regions overlap",
        ),
    ] {
        assert_eq!(refused(&regions, 8 * PAGE), why, "{regions:?}");
    }
}

#[test]
fn more_regions_or_more_memory_than_is_supported_is_refused() {
    let regions: Vec<_> = (0..=REGIONS_MAX as u64)
        .map(|i| region(i * PAGE, PAGE, 0))
        .collect();
    assert_eq!(refused(&regions, PAGE), "too many memory regions");
    let half = VHOST_MEMORY_BYTES_MAX / 2;
    let regions = [region(0, half, 0), region(half, half, 0), region(2 * half, 1, 0)];
    assert_eq!(refused(&regions, half), "more guest memory than is supported");
}

#[test]
fn a_range_may_go_on_in_the_region_beside_and_not_over_a_hole() {
    let guest = Guest::new(&[(0x1000, PAGE), (0x2000, PAGE), (0x4000, PAGE)]);
    let bytes: Vec<u8> = (0..8192_u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
    guest.put(0x1000, &bytes);
    assert_eq!(guest.get(0x1ffe, 4), bytes[0xffe..0x1002]);
    let memory = &guest.memory;
    for (at, len) in [
        (0xfff, 1),
        (0xfff, 2),
        (0x2fff, 2),
        (0x3000, 1),
        (0x2fff, 0x1002),
        (0x4fff, 2),
        (0x5000, 1),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (0x1000, u64::MAX),
        (0x1000, 1 << 32),
    ] {
        assert_eq!(
            memory.check(at, len),
            Err(Fault::Outside { at, len }),
            "{len} at {at:#x}"
        );
    }
    memory.check(0x1000, 0x2000).unwrap();
    // Nothing is nowhere.
    memory.check(u64::MAX, 0).unwrap();
    assert!(memory.write(0x2fff, &[1, 2], None).is_err());
    assert!(GuestMemory::empty().read(0, &mut [0]).is_err());
}

#[test]
fn a_number_is_aligned_and_in_one_region() {
    // The second region begins at an odd place.
    let guest = Guest::new(&[(0x1000, 0x801), (0x1801, 0x7ff)]);
    guest.memory.store_u16(0x1002, 0x1234).unwrap();
    guest.memory.store_u32(0x1004, 0x89ab_cdef).unwrap();
    assert_eq!(guest.get(0x1002, 6), [0x34, 0x12, 0xef, 0xcd, 0xab, 0x89]);
    assert_eq!(guest.memory.load_u16(0x1002), Ok(0x1234));
    for at in [0x1001, 0x1800, 0x1fff, 0x2000, u64::MAX, 0] {
        assert!(guest.memory.load_u16(at).is_err(), "{at:#x}");
        assert!(guest.memory.store_u16(at, 0).is_err(), "{at:#x}");
    }
    assert!(guest.memory.store_u32(0x1006, 0).is_err());
}

#[test]
fn tables_that_requests_keep_count_as_the_one_that_is_new() {
    let fd = memfd(PAGE);
    let account = account();
    let table = || {
        let regions = (0..REGIONS_MAX as u64).map(|i| (region(i * PAGE, PAGE, 0), fd.try_clone().unwrap()));
        GuestMemory::set(&account, regions.collect())
    };
    let kept = [table().unwrap(), table().unwrap()];
    assert!(table().is_err(), "a third");
    drop(kept);
    while table().is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn requests_go_on_with_the_memory_they_began_with_when_regions_come_and_go() {
    let fd = memfd(2 * PAGE);
    let first = region(0, PAGE, 0);
    let one = GuestMemory::set(&account(), vec![(first, fd.try_clone().unwrap())]).unwrap();
    let two = one
        .with(&account(), region(PAGE, PAGE, PAGE), fd.try_clone().unwrap())
        .unwrap();
    assert!(one.check(PAGE, 1).is_err() && two.check(0, 2 * PAGE).is_ok());
    two.write(PAGE - 1, b"ab", None).unwrap();
    // The offset does not name a region.
    let rest = two.without(&region(0, PAGE, 77)).unwrap();
    assert_eq!(rest.regions(), 1);
    assert!(rest.check(0, 1).is_err());
    for memory in [&one, &two] {
        let mut out = [0];
        memory.read(PAGE - 1, &mut out).unwrap();
        assert_eq!(&out, b"a");
    }
    assert!(
        two.with(&account(), region(0, 1, 0), fd.try_clone().unwrap())
            .is_err()
    );
    for wrong in [
        region(1, PAGE, 0),
        region(0, PAGE - 1, 0),
        Region { user: 0, ..first },
    ] {
        assert!(two.without(&wrong).is_err(), "{wrong:?}");
    }
    assert!(rest.without(&first).is_err());
    // Cut off, it breaks for all who have it.
    ftruncate(&fd, PAGE).unwrap();
    assert!(!rest.is_broken());
    assert_eq!(rest.read(PAGE, &mut [0]), Err(Fault::Gone));
    assert!(rest.is_broken() && two.is_broken() && !one.is_broken());
}

#[test]
fn user_addresses_lead_to_guest_addresses() {
    let guest = Guest::new(&[(0x1000, PAGE), (0x9000, PAGE)]);
    for at in [0x1000, 0x1fff, 0x9000, 0x9fff] {
        assert_eq!(guest.memory.guest_of_user(at + USER), Some(at));
    }
    for user in [0, 0x1000, USER + 0xfff, USER + 0x2000, USER + 0xa000, u64::MAX] {
        assert_eq!(guest.memory.guest_of_user(user), None);
    }
}

#[test]
fn a_log_that_is_cut_off_is_told_and_kills_nobody() {
    let fd = memfd(2 * PAGE);
    let log = DirtyLog::new(&account(), &fd, 0, 2 * PAGE as usize).unwrap();
    ftruncate(&fd, 0).unwrap();
    assert!(!log.is_broken());
    log.mark(0, u64::MAX);
    assert!(log.is_broken());
    assert!(DirtyLog::new(&account(), &fd, 0, 1).is_err());
    let long = memfd(VHOST_LOG_BYTES_MAX + 1);
    assert!(DirtyLog::new(&account(), &long, 0, VHOST_LOG_BYTES_MAX as usize + 1).is_err());
}

/// Where in the file each address of a small space is.
fn model(regions: &[Region], space: u64) -> Option<Vec<Option<u64>>> {
    let mut places = vec![None; space as usize];
    for region in regions {
        for i in 0..region.len {
            let place = &mut places[(region.guest + i) as usize];
            if place.replace(region.offset + i).is_some() {
                return None;
            }
        }
    }
    Some(places)
}

proptest! {
    #[test]
    fn every_address_is_where_its_region_says(
        regions in prop::collection::vec((0..200_u64, 1..60_u64, 0..200_u64), 0..6),
        ranges in prop::collection::vec((0..300_u64, 0..120_usize), 20),
    ) {
        let regions: Vec<_> = regions.into_iter().map(|(guest, len, offset)| region(guest, len, offset)).collect();
        let fd = memfd(PAGE);
        let whole = Mapping::new(&account(), &fd, 0, PAGE as usize).unwrap();
        let bytes: Vec<u8> = (0..PAGE).map(|i| (i * 31 + i / 256) as u8).collect();
        whole.write(0, &bytes).unwrap();
        let passed = regions.iter().map(|region| (*region, fd.try_clone().unwrap())).collect();
        let memory = GuestMemory::set(&account(), passed);
        let Some(places) = model(&regions, 300) else {
            prop_assert!(memory.is_err());
            return Ok(());
        };
        let memory = memory.unwrap();
        for (at, len) in ranges {
            let expected: Option<Vec<u8>> = (at..at + len as u64)
                .map(|at| places.get(at as usize).copied().flatten().map(|place| bytes[place as usize]))
                .collect();
            let mut out = vec![0; len];
            let read = memory.read(at, &mut out).ok().map(|()| out);
            prop_assert_eq!(&read, &expected, "{} at {}", len, at);
            prop_assert_eq!(memory.check(at, len as u64).is_ok(), expected.is_some());
        }
    }

    #[test]
    fn the_log_has_the_bits_of_the_pages_that_were_written_and_no_others(
        writes in prop::collection::vec((0..40 * PAGE, 0..20 * PAGE), 1..6),
        far in any::<(u64, u64)>(),
    ) {
        // For 24 pages.
        let fd = memfd(PAGE);
        let log = DirtyLog::new(&account(), &fd, 8, 3).unwrap();
        let mut expected = [false; 24];
        let mut beyond = 0;
        for (at, len) in &writes {
            log.mark(*at, *len);
            for page in 0..80 {
                if *len > 0 && page * PAGE < at + len && at < &((page + 1) * PAGE) {
                    match expected.get_mut(page as usize) {
                        Some(bit) => *bit = true,
                        None => beyond += 1,
                    }
                }
            }
        }
        prop_assert_eq!(log.ignored(), beyond);
        log.mark(far.0 | 1 << 40, far.1);
        let whole = Mapping::new(&account(), &fd, 0, PAGE as usize).unwrap();
        let mut bytes = vec![0; PAGE as usize];
        whole.read(0, &mut bytes).unwrap();
        for (page, bit) in expected.iter().enumerate() {
            prop_assert_eq!(bytes[8 + page / 8] >> (page % 8) & 1 == 1, *bit, "page {}", page);
        }
        prop_assert!(bytes[..8].iter().chain(&bytes[11..]).all(|byte| *byte == 0));
    }
}

#[test]
fn what_is_written_is_logged() {
    let guest = Guest::new(&[(0, 4 * PAGE)]);
    let fd = memfd(PAGE);
    let log = DirtyLog::new(&account(), &fd, 0, 1).unwrap();
    guest.memory.write(PAGE - 1, &[1, 2], Some(&log)).unwrap();
    guest.memory.write(3 * PAGE, &[], Some(&log)).unwrap();
    let bits = Mapping::new(&account(), &fd, 0, 1).unwrap();
    assert_eq!(bits.load_u8(0), Ok(0b11));
    assert!(guest.memory.write(4 * PAGE, &[1], Some(&log)).is_err());
    assert_eq!(log.ignored(), 0);
}
