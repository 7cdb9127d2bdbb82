//! A hostile guest: chains, rings and requests as no driver lays them. The worst that it reaches is that its own device ends. The
//! daemon goes on, and so does the neighbour on the same shard, who reads all the while. (Hostile front-ends are in
//! vhost_hostile_front_end.rs and vhost_hostile_memory.rs.)

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::RngExt;
use vold_tests::content::{bytes, seeded};
use vold_tests::neighbour::{Street, own};
use vold_tests::scale;
use vold_tests::vhost::*;

/// What a chain came to: its status, or `None` when the device hung up.
type Fate = Option<u8>;

fn ends_or_fails(fate: Fate) -> bool {
    matches!(fate, None | Some(S_IOERR | S_UNSUPP))
}

/// Lays a chain in a device of its own, looks at what came of it, and that all else goes on. `lay` gives the chain's descriptors,
/// the head first, and the place of its status.
fn attack(
    street: &Street,
    case: &str,
    fits: impl Fn(Fate) -> bool,
    lay: impl FnOnce(&mut FrontEnd) -> (Vec<u16>, u64),
) {
    let mut front_end = street.front_end();
    let (descriptors, status) = lay(&mut front_end);
    let fate = front_end.judge(descriptors, status);
    println!("{case}: {fate:?}");
    assert!(fits(fate), "{case}: {fate:?}");
    drop(front_end);
    street.goes_on();
}

/// Places for a chain in the spare room: header, status, data.
fn places(front_end: &FrontEnd) -> (u64, u64, u64) {
    let (at, _) = front_end.spare;
    (at, at + 64, at + 4096)
}

/// A read of sector 0 whose parts a test chooses.
fn read_header(front_end: &FrontEnd) -> (u64, u64, u64) {
    let (header, status, data) = places(front_end);
    front_end.write_header(header, T_IN, 0);
    (header, status, data)
}

#[test]
fn chains_that_loop() {
    let street = Street::new();
    attack(
        &street,
        "a descriptor that is its own next",
        ends_or_fails,
        |fe| {
            let (header, status, _) = read_header(fe);
            fe.queues[0].write_descriptor(&fe.memory, 5, header, 16, NEXT, 5);
            (vec![5], status)
        },
    );
    attack(&street, "two that follow each other", ends_or_fails, |fe| {
        let (header, status, data) = read_header(fe);
        fe.queues[0].write_descriptor(&fe.memory, 5, header, 16, NEXT, 6);
        fe.queues[0].write_descriptor(&fe.memory, 6, data, 512, NEXT | WRITE, 7);
        fe.queues[0].write_descriptor(&fe.memory, 7, data, 512, NEXT | WRITE, 6);
        (vec![5], status)
    });
    attack(&street, "a next beyond the table", ends_or_fails, |fe| {
        let (header, status, _) = read_header(fe);
        fe.queues[0].write_descriptor(&fe.memory, 5, header, 16, NEXT, 64);
        (vec![5], status)
    });
    attack(&street, "an indirect table that loops", ends_or_fails, |fe| {
        let (header, status, data) = read_header(fe);
        let table = data + 8192;
        let parts = [Part::readable(header, 16), Part::writable(data, 512)];
        let chain = fe.queues[0].indirect_chain(&fe.memory, table, &parts);
        // The last entry goes on with the first.
        fe.memory.write(table + 16 + 12, &[(NEXT | WRITE) as u8, 0, 0, 0]);
        (chain, status)
    });
    street.is_unharmed();
}

#[test]
fn chains_that_point_outside_of_the_regions() {
    let street = Street::new();
    for (case, at) in [
        ("zero", 0),
        ("below", GUEST - 4096),
        ("half below", GUEST - 256),
        ("at the end", u64::MAX),
        ("another process's", USER),
    ] {
        for what in ["header", "data", "status"] {
            attack(&street, &format!("{what} {case}"), ends_or_fails, |fe| {
                let (header, status, data) = read_header(fe);
                // (The end is not known before.)
                let at = if at == u64::MAX { fe.memory.end() } else { at };
                let place = |name: &str, own: u64| if name == what { at } else { own };
                let parts = [
                    Part::readable(place("header", header), 16),
                    Part::writable(place("data", data), 512),
                    Part::writable(place("status", status), 1),
                ];
                (fe.queues[0].chain(&fe.memory, &parts), status)
            });
        }
    }
    attack(
        &street,
        "data that begins inside and ends outside",
        ends_or_fails,
        |fe| {
            let (header, status, _) = read_header(fe);
            let data = fe.memory.end() - 256;
            let parts = [
                Part::readable(header, 16),
                Part::writable(data, 512),
                Part::writable(status, 1),
            ];
            (fe.queues[0].chain(&fe.memory, &parts), status)
        },
    );
    attack(&street, "an indirect table outside", ends_or_fails, |fe| {
        let (_, status, _) = read_header(fe);
        fe.queues[0].write_descriptor(&fe.memory, 9, GUEST - 4096, 48, INDIRECT, 0);
        (vec![9], status)
    });
    street.is_unharmed();
}

/// Memory of two regions with a gap between them, and another two without one, whose bytes lie elsewhere in the file.
#[test]
fn chains_across_regions() {
    let street = Street::new();
    let split = |front_end: &FrontEnd, gap: u64| {
        let whole = front_end.memory.region();
        let at = front_end.spare.0 + (64 << 10) - whole.guest;
        let first = Region { len: at, ..whole };
        let second = Region {
            guest: whole.guest + at + gap,
            user: whole.user + at + gap,
            offset: at,
            len: whole.len - at - gap,
        };
        let table = memory_table(&[first, second]);
        let descriptor = front_end.memory.file();
        let wire = &front_end.wire;
        wire.done(SET_MEM_TABLE, &table, &[descriptor.as_fd(), descriptor.as_fd()])
            .unwrap();
        whole.guest + at
    };
    let read_across = |front_end: &mut FrontEnd, border: u64| {
        let (header, status, _) = read_header(front_end);
        let parts = [
            Part::readable(header, 16),
            Part::writable(border - 1024, 4096),
            Part::writable(status, 1),
        ];
        let chain = front_end.queues[0].chain(&front_end.memory, &parts);
        front_end.judge(chain, status)
    };
    let mut front_end = street.front_end();
    let border = split(&front_end, 0);
    assert_eq!(read_across(&mut front_end, border), Some(S_OK));
    assert!(front_end.memory.read(border - 1024, 4096) == own()[..4096]);
    drop(front_end);
    let mut front_end = street.front_end();
    let border = split(&front_end, 4096);
    let fate = read_across(&mut front_end, border);
    assert!(ends_or_fails(fate), "across a gap: {fate:?}");
    drop(front_end);
    street.is_unharmed();
}

/// Where VIRTIO has no rule for the layout, a device has none either.
#[test]
fn odd_layouts_are_served() {
    let street = Street::new();
    let mut fe = street.front_end_as(Shape {
        size: 1024,
        ..Shape::default()
    });
    let (at, _) = fe.spare;
    let (header, status, data, table) = (at, at + 64, at + 4096, at + (256 << 10));
    let split_header = [
        Part::readable(header, 1),
        Part::readable(header + 1, 7),
        Part::readable(header + 8, 8),
    ];
    let with_header = |more: &[Part]| [&split_header[..], more].concat();

    // A read whose header is in three parts and whose data is in parts of a byte.
    fe.write_header(header, T_IN, 8);
    let mut parts = with_header(&[]);
    parts.extend((0..512).map(|i| Part::writable(data + 2 * i, 1)));
    parts.push(Part::writable(status, 1));
    let chain = fe.queues[0].indirect_chain(&fe.memory, table, &parts);
    assert_eq!(fe.judge(chain, status), Some(S_OK));
    let spread = fe.memory.read(data, 1024);
    let read: Vec<u8> = spread.iter().step_by(2).copied().collect();
    assert!(read == own()[4096..4096 + 512], "data in parts of a byte");
    assert!(
        spread.iter().skip(1).step_by(2).all(|byte| *byte == 0),
        "nothing between them"
    );
    // The same without a table.
    fe.write_header(header, T_IN, 9);
    let chain = fe.queues[0].chain(&fe.memory, &parts);
    assert_eq!(fe.judge(chain, status), Some(S_OK));
    let read: Vec<u8> = fe.memory.read(data, 1024).into_iter().step_by(2).collect();
    assert!(read == own()[4608..4608 + 512]);

    // A write whose data follows the header in one part, cut at odd places after that.
    let new = bytes(5, 4096);
    fe.write_header(data, T_OUT, 256);
    fe.memory.write(data + 16, &new);
    let parts = [
        Part::readable(data, 16 + 1001),
        Part::readable(data + 16 + 1001, 3),
        Part::readable(data + 16 + 1004, 4096 - 1004),
        Part::writable(status, 1),
    ];
    let chain = fe.queues[0].chain(&fe.memory, &parts);
    assert_eq!(fe.judge(chain, status), Some(S_OK));
    assert!(fe.read(256 * 512, 4096) == Ok(new));

    // A read whose status shares a part with the data: it is the last byte that the device may write.
    fe.write_header(header, T_IN, 0);
    let parts = with_header(&[Part::writable(data, 100), Part::writable(data + 100, 413)]);
    let chain = fe.queues[0].chain(&fe.memory, &parts);
    assert_eq!(fe.judge(chain, data + 512), Some(S_OK));
    assert!(fe.memory.read(data, 512) == own()[..512]);

    // The device's name, in a part too short for all of it and in one that is longer.
    for len in [20, 3, 40] {
        fe.write_header(header, T_GET_ID, 0);
        let parts = with_header(&[Part::writable(data, len), Part::writable(status, 1)]);
        let chain = fe.queues[0].chain(&fe.memory, &parts);
        let fate = fe.judge(chain, status);
        assert!(fate.is_some(), "a name of {len} bytes ends no device");
        assert!(len != 20 || fate == Some(S_OK));
    }
    drop(fe);
    street.is_unharmed();
}

#[test]
fn chains_without_a_header_or_a_status() {
    let street = Street::new();
    type Lay = fn(u64, u64, u64) -> Vec<Part>;
    let cases: [(&str, Lay); 7] = [
        ("a header alone", |header, _, _| vec![Part::readable(header, 16)]),
        ("half a header", |header, status, _| {
            vec![Part::readable(header, 8), Part::writable(status, 1)]
        }),
        ("a status alone", |_, status, _| vec![Part::writable(status, 1)]),
        ("no status in a write", |header, _, data| {
            vec![Part::readable(header, 16), Part::readable(data, 512)]
        }),
        ("a header that the device writes", |header, status, _| {
            vec![Part::writable(header, 16), Part::writable(status, 1)]
        }),
        ("writable before readable", |header, status, data| {
            vec![
                Part::readable(header, 16),
                Part::writable(status, 1),
                Part::readable(data, 512),
            ]
        }),
        ("a status of no bytes", |header, status, _| {
            vec![Part::readable(header, 16), Part::writable(status, 0)]
        }),
    ];
    for (case, parts) in cases {
        for kind in [T_IN, T_OUT, T_GET_ID, T_DISCARD] {
            attack(&street, &format!("{case}, kind {kind}"), ends_or_fails, |fe| {
                let (header, status, data) = places(fe);
                fe.write_header(header, kind, 0);
                (
                    fe.queues[0].chain(&fe.memory, &parts(header, status, data)),
                    status,
                )
            });
        }
    }
    street.is_unharmed();
}

#[test]
fn indirect_in_indirect() {
    let street = Street::new();
    attack(&street, "a table within a table", ends_or_fails, |fe| {
        let (header, status, data) = read_header(fe);
        let (outer, inner) = (data + 8192, data + 16384);
        let parts = [
            Part::readable(header, 16),
            Part::writable(data, 512),
            Part::writable(status, 1),
        ];
        fe.queues[0].indirect_chain(&fe.memory, inner, &parts);
        let chain = fe.queues[0].indirect_chain(&fe.memory, outer, &[Part::readable(inner, 48)]);
        fe.memory.write(outer + 12, &[INDIRECT as u8, 0]);
        (chain, status)
    });
    attack(&street, "a table that is its own", ends_or_fails, |fe| {
        let (_, status, data) = read_header(fe);
        let chain = fe.queues[0].indirect_chain(&fe.memory, data, &[Part::readable(data, 16)]);
        fe.memory.write(data + 12, &[INDIRECT as u8, 0]);
        (chain, status)
    });
    for (case, len, flags) in [
        ("a table with a next beside it", 48, INDIRECT | NEXT),
        ("a table of no bytes", 0, INDIRECT),
        ("a table of a part of an entry", 40, INDIRECT),
        ("a table of one byte more", 49, INDIRECT),
        ("a table of a million entries", 16 << 20, INDIRECT),
        ("a table of 4 GiB", u32::MAX - 15, INDIRECT),
    ] {
        attack(&street, case, ends_or_fails, |fe| {
            let (header, status, data) = read_header(fe);
            let table = data + 8192;
            let parts = [
                Part::readable(header, 16),
                Part::writable(data, 512),
                Part::writable(status, 1),
            ];
            let chain = fe.queues[0].indirect_chain(&fe.memory, table, &parts);
            fe.queues[0].write_descriptor(&fe.memory, chain[0], table, len, flags, chain[0] + 1);
            (chain, status)
        });
    }
    // Where tables were not agreed on a driver must not use them; a device may take them or not.
    let mut fe = street.front_end_as(Shape {
        features: Shape::default().features & !F_INDIRECT_DESC,
        ..Shape::default()
    });
    let (header, status, data) = read_header(&fe);
    let parts = [
        Part::readable(header, 16),
        Part::writable(data, 512),
        Part::writable(status, 1),
    ];
    let chain = fe.queues[0].indirect_chain(&fe.memory, data + 8192, &parts);
    let fate = fe.judge(chain, status);
    assert!(
        fate == Some(S_OK) || ends_or_fails(fate),
        "a table that was not agreed on: {fate:?}"
    );
    drop(fe);
    street.is_unharmed();
}

#[test]
fn lengths_of_zero_and_of_4_gib() {
    let street = Street::new();
    for kind in [T_IN, T_OUT] {
        let data_part = move |data, len| {
            if kind == T_IN {
                Part::writable(data, len)
            } else {
                Part::readable(data, len)
            }
        };
        // Nothing between header and status; then nothing in a part of its own.
        for lens in [vec![], vec![0], vec![0, 0, 0]] {
            attack(
                &street,
                &format!("kind {kind}, data of {lens:?}"),
                |_| true,
                |fe| {
                    let (header, status, data) = places(fe);
                    fe.write_header(header, kind, 0);
                    let mut parts = vec![Part::readable(header, 16)];
                    parts.extend(lens.iter().map(|len| data_part(data, *len)));
                    parts.push(Part::writable(status, 1));
                    (fe.queues[0].chain(&fe.memory, &parts), status)
                },
            );
        }
        for lens in [
            vec![u32::MAX],
            vec![u32::MAX - 511],
            vec![1 << 31],
            vec![u32::MAX - 511; 40],
            vec![1 << 31, 1 << 31],
        ] {
            attack(
                &street,
                &format!("kind {kind}, data of {lens:?}"),
                ends_or_fails,
                |fe| {
                    let (header, status, data) = places(fe);
                    fe.write_header(header, kind, 0);
                    let mut parts = vec![Part::readable(header, 16)];
                    parts.extend(lens.iter().map(|len| data_part(data, *len)));
                    parts.push(Part::writable(status, 1));
                    (fe.queues[0].chain(&fe.memory, &parts), status)
                },
            );
        }
    }
    street.is_unharmed();
}

#[test]
fn addresses_and_lengths_whose_sums_wrap() {
    let street = Street::new();
    for at in [
        u64::MAX,
        u64::MAX - 511,
        u64::MAX - 4096,
        1 << 63,
        (1 << 63) - 512,
    ] {
        for len in [512, 8192, u32::MAX] {
            attack(
                &street,
                &format!("data of {len} at {at:#x}"),
                ends_or_fails,
                |fe| {
                    let (header, status, _) = read_header(fe);
                    let parts = [
                        Part::readable(header, 16),
                        Part::writable(at, len),
                        Part::writable(status, 1),
                    ];
                    (fe.queues[0].chain(&fe.memory, &parts), status)
                },
            );
        }
    }
    street.is_unharmed();
}

#[test]
fn sectors_past_the_capacity_or_wrapping() {
    let street = Street::new();
    let mut fe = street.front_end();
    let capacity = fe.capacity() / SECTOR;
    let all_before = fe.read(0, 64 << 10).unwrap();
    let last = fe.read((capacity - 8) * SECTOR, 4096).unwrap();
    for sector in [
        capacity - 7,
        capacity,
        capacity + 1,
        u64::from(u32::MAX),
        1 << 55,
        (1 << 55) - 1,
        (1 << 55) + 1,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ] {
        for (kind, out, read) in [(T_IN, 0, 4096), (T_OUT, 4096, 0)] {
            let done = fe.call(kind, sector, &vec![0xbb; out], read);
            assert_eq!(done.status, S_IOERR, "kind {kind}, sector {sector}");
        }
    }
    // No whole number of sectors.
    for len in [1, 511, 513, 4095] {
        assert_eq!(fe.call(T_IN, 0, &[], len).status, S_IOERR, "read of {len}");
        assert_eq!(
            fe.call(T_OUT, 0, &vec![0xbb; len], 0).status,
            S_IOERR,
            "write of {len}"
        );
    }
    // Kinds that there are not, and those of other devices.
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        17,
        18,
        20,
        22,
        24,
        26,
        1 << 31,
        u32::MAX,
    ] {
        let status = fe.call(kind, 0, &[], 512).status;
        assert!(status == S_UNSUPP || status == S_IOERR, "kind {kind}: {status}");
    }
    assert!(fe.read(0, 64 << 10).unwrap() == all_before, "nothing was written");
    assert!(fe.read((capacity - 8) * SECTOR, 4096).unwrap() == last);
    drop(fe);
    street.is_unharmed();
}

#[test]
fn discard_segments_out_of_range() {
    let street = Street::new();
    let mut fe = street.front_end();
    let capacity = fe.capacity() / SECTOR;
    let before = fe.read(0, 64 << 10).unwrap();
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for (sector, sectors, flags) in [
            (capacity, 8, 0),
            (capacity - 4, 8, 0),
            (0, u32::MAX, 0),
            (u64::MAX, 8, 0),
            (u64::MAX - 7, 16, 0),
            (1 << 55, 8, 0),
            ((1 << 55) - 1, 2, 0),
            (1 << 63, 1 << 31, 0),
            // Flags that there are not.
            (0, 8, 2),
            (0, 8, u32::MAX),
        ] {
            let status = fe.call(kind, 0, &segment(sector, sectors, flags), 0).status;
            assert!(
                status == S_IOERR || status == S_UNSUPP,
                "kind {kind}: {sectors} sectors at {sector}, flags {flags}: {status}"
            );
        }
        // One good segment before a bad one: neither is to leave the volume's end.
        let both = [segment(capacity - 8, 8, 0), segment(capacity, 8, 0)].concat();
        assert_eq!(fe.call(kind, 0, &both, 0).status, S_IOERR);
        // No whole segments, none at all, thousands.
        for len in [0, 1, 15, 17, 31] {
            let status = fe.call(kind, 0, &vec![0; len], 0).status;
            assert!(
                status == S_IOERR || status == S_UNSUPP,
                "{len} bytes of segments: {status}"
            );
        }
        let thousands = segment(0, 1, 0).repeat(8192);
        let status = fe.call(kind, 0, &thousands, 0).status;
        assert!(status == S_IOERR || status == S_UNSUPP, "8192 segments: {status}");
    }
    // Discard has no unmap flag.
    assert_ne!(fe.call(T_DISCARD, 0, &segment(0, 8, 1), 0).status, S_OK);
    assert!(fe.read(0, 64 << 10).unwrap() == before, "nothing was discarded");
    // And what is in range works.
    assert_eq!(fe.call(T_DISCARD, 0, &segment(1024, 8, 0), 0).status, S_OK);
    assert_eq!(fe.call(T_WRITE_ZEROES, 0, &segment(2048, 8, 1), 0).status, S_OK);
    drop(fe);
    street.is_unharmed();
}

#[test]
fn indexes_that_jump() {
    let street = Street::new();
    for jump in [65, 66, 1024, 32767, 32768, 65535] {
        let fe = street.front_end();
        let queue = &fe.queues[0];
        queue.set_available_index(&fe.memory, queue.used_index(&fe.memory).wrapping_add(jump));
        queue.kick();
        fe.wire.ends();
        // (What it found in the ring before the end is no matter: there was nothing.)
        assert!(fe.pending.is_empty());
        drop(fe);
        street.goes_on();
    }
    // Heads beyond the table.
    for head in [64, 65, 1023, u16::MAX] {
        let mut fe = street.front_end();
        let memory = &fe.memory;
        fe.queues[0].offer(memory, head);
        fe.queues[0].kick();
        fe.wire.ends();
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}

/// One head many times at once: the device may answer each or end, but nothing else.
#[test]
fn a_head_that_is_offered_again_while_it_is_in_flight() {
    let street = Street::new();
    for _ in 0..scale(5, 50) {
        let mut fe = street.front_end();
        let head = fe.submit(0, T_IN, 0, &[], 64 << 10);
        for _ in 0..32 {
            fe.queues[0].offer(&fe.memory, head);
        }
        fe.queues[0].kick();
        let mut answers = 0;
        let wire = &fe.wire;
        while answers < 33 {
            let Some(used) = fe.queues[0].used_before(&fe.memory, || wire.has_ended()) else {
                break;
            };
            assert_eq!(used.head, head);
            answers += 1;
        }
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}

/// A guest that writes other things into its descriptors and headers while the device reads them.
#[test]
fn descriptors_changed_during_the_request() {
    let street = Street::new();
    let mut rng = seeded("descriptors_changed");
    let mut answered = [0; 2];
    for round in 0..scale(12, 100) {
        let mut fe = street.front_end();
        let capacity = fe.capacity();
        let file = fe.memory.file().try_clone().unwrap();
        let table = fe.queues[0].descriptors - GUEST;
        let slots: Vec<u64> = (0..64).map(|head| fe.slot(0, head).0 - GUEST).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let seed = rng.random::<u64>();
        let scribbler = std::thread::spawn(move || {
            let mut rng = <rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(seed);
            while !stopped.load(Ordering::Relaxed) {
                let index = rng.random_range(0..64u64);
                let (at, value): (u64, u64) = match rng.random_range(0..6) {
                    0 => (table + 16 * index, rng.random()),
                    1 => (table + 16 * index, GUEST + rng.random_range(0..1 << 20)),
                    2 => (table + 16 * index + 8, rng.random()),
                    3 => (slots[index as usize], rng.random_range(0..16)),
                    4 => (
                        slots[index as usize] + 8,
                        rng.random_range(0..capacity * 2 / SECTOR),
                    ),
                    _ => (slots[index as usize] + 8, rng.random()),
                };
                // In rounds of one sort only flags and next change, so that devices live longer.
                let bytes = value.to_le_bytes();
                let (at, bytes) = if round % 2 == 0 {
                    (at, &bytes[..])
                } else {
                    (table + 16 * index + 8, &bytes[..2])
                };
                let _ = file.write_all_at(bytes, at);
            }
        });
        'device: for _ in 0..40 {
            for i in 0..16 {
                // Into its own second half, reading the first: what it writes goes anywhere in its own volume, and nowhere else.
                fe.submit(0, T_IN, i * 8, &[], 4096);
            }
            fe.queues[0].kick();
            for _ in 0..16 {
                match fe.complete_or_end(0) {
                    Some(_) => answered[0] += 1,
                    None => {
                        answered[1] += 1;
                        break 'device;
                    }
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
        drop(fe);
        street.goes_on();
    }
    println!("{} answers, {} devices ended", answered[0], answered[1]);
    let mut fe = street.front_end();
    fe.write(0, &own()).unwrap();
    drop(fe);
    street.is_unharmed();
}

#[test]
fn floods_of_kicks() {
    let street = Street::new();
    let mut fe = street.front_end();
    let kick = fe.queues[0].kick_descriptor().try_clone().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let flood = std::thread::spawn(move || {
        let mut kicks = 0u64;
        while !stopped.load(Ordering::Relaxed) {
            let _ = rustix::io::write(&kick, &1u64.to_ne_bytes());
            kicks += 1;
        }
        kicks
    });
    for i in 0..scale(200, 5000u64) {
        assert!(fe.read(i % 16 * 4096, 4096).unwrap() == own()[(i % 16 * 4096) as usize..][..4096]);
        if i % 50 == 0 {
            street.goes_on();
        }
    }
    stop.store(true, Ordering::Relaxed);
    println!("{} kicks", flood.join().unwrap());
    // A count that is as high as it can be is one kick, too.
    let _ = rustix::io::write(fe.queues[0].kick_descriptor(), &(u64::MAX - 1).to_ne_bytes());
    assert!(fe.read(0, 4096).unwrap() == own()[..4096]);
    drop(fe);
    street.is_unharmed();
}

/// More in flight than the device takes at once, from all queues, again and again.
#[test]
fn full_rings_of_large_requests() {
    let street = Street::new();
    let mut fe = street.front_end_as(Shape {
        queues: 4,
        size: 256,
        ..Shape::default()
    });
    let requests = 256 / 3;
    for round in 0..scale(2, 20) {
        for queue in 0..4 {
            for i in 0..requests {
                fe.submit(queue, T_IN, (i + round) % 64 * 128, &[], 64 << 10);
            }
            fe.notify(queue);
        }
        street.goes_on();
        for queue in 0..4 {
            for _ in 0..requests {
                assert_eq!(fe.complete(queue).status, S_OK);
            }
        }
    }
    assert!(fe.pending.is_empty());
    drop(fe);
    street.is_unharmed();
}

/// Who wants to know which ring of a device its guest has broken passes an eventfd for it.
#[test]
fn a_ring_that_is_broken_is_told_to_who_asked_for_it_and_no_other_ring_is() {
    let street = Street::new();
    let shape = Shape {
        queues: 2,
        ..Shape::default()
    };
    for broken in [0, 1] {
        let mut fe = FrontEnd::connect_as(street.socket(), shape);
        let events = [new_eventfd(), new_eventfd()];
        for (queue, event) in (0u64..).zip(&events) {
            let payload = queue.to_le_bytes();
            fe.wire.done(SET_VRING_ERR, &payload, &[event.as_fd()]).unwrap();
        }
        for queue in [0, 1] {
            fe.submit(queue, T_IN, 0, &[], 512);
            fe.notify(queue);
            assert_eq!(fe.complete(queue).status, S_OK);
        }
        let told = |event| {
            let mut count = [0; 8];
            match rustix::io::read(event, &mut count) {
                Ok(_) => u64::from_ne_bytes(count),
                Err(_) => 0,
            }
        };
        assert_eq!(events.each_ref().map(told), [0, 0], "there is no fault yet");
        let queue = &mut fe.queues[broken];
        queue.write_descriptor(&fe.memory, 5, fe.spare.0, 16, NEXT, 5);
        queue.offer(&fe.memory, 5);
        queue.kick();
        fe.wire.ends();
        let wanted = [u64::from(broken == 0), u64::from(broken == 1)];
        assert_eq!(events.each_ref().map(told), wanted, "ring {broken} is broken");
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}
