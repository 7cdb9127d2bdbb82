//! A mapping keeps to itself whatever happens to its file.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;
use crate::vhost::guest::{account, memfd};

const PAGE: usize = 4096;

#[test]
fn bytes_and_numbers_come_out_as_they_went_in_at_every_alignment() {
    let fd = memfd(8 * PAGE as u64);
    // Neither offset nor length is of whole pages.
    let mapping = Mapping::new(&account(), &fd, 4099, 3 * PAGE + 5).unwrap();
    let other = Mapping::new(&account(), &fd, 0, 8 * PAGE).unwrap();
    let bytes: Vec<u8> = (0..700_u32).map(|i| (i * 7 + 1) as u8).collect();
    for at in 0..17 {
        for len in [0, 1, 2, 7, 8, 9, 16, 63, 127, 128, 129, 512, 700] {
            let mut out = vec![0xee; len];
            mapping.write(at, &bytes[..len]).unwrap();
            mapping.read(at, &mut out).unwrap();
            assert_eq!(out, &bytes[..len], "{len} bytes at {at}");
            other.read(4099 + at, &mut out).unwrap();
            assert_eq!(out, &bytes[..len], "{len} bytes at {at}, in the file");
        }
    }
    other.store_u16(2, 0x1234).unwrap();
    other.store_u32(4, 0x5678_9abc).unwrap();
    other.store_u64(8, u64::MAX - 1).unwrap();
    other.store_u8(1, 9).unwrap();
    other.set_bits(1, 0x84).unwrap();
    assert_eq!((other.load_u8(1), other.load_u16(2)), (Ok(0x8d), Ok(0x1234)));
    assert_eq!(
        (other.load_u32(4), other.load_u64(8)),
        (Ok(0x5678_9abc), Ok(u64::MAX - 1))
    );
    // The base lies at an odd address.
    assert!(mapping.load_u16(0).is_err() && mapping.load_u16(1).is_ok());
}

#[test]
fn no_access_is_outside() {
    let fd = memfd(2 * PAGE as u64);
    let mapping = Mapping::new(&account(), &fd, 0, 1000).unwrap();
    let mut out = [0; 10];
    for at in [991, 1000, PAGE, usize::MAX - 5, usize::MAX] {
        let outside = Err(Fault::Outside {
            at: at as u64,
            len: 10,
        });
        assert_eq!(mapping.read(at, &mut out), outside);
        assert_eq!(mapping.write(at, &out), outside);
    }
    mapping.read(990, &mut out).unwrap();
    assert!(
        mapping.load_u16(999).is_err() && mapping.load_u64(996).is_err() && mapping.load_u64(992).is_ok()
    );
    assert!(mapping.set_bits(1000, 1).is_err() && mapping.load_u32(2).is_err());
    assert!(!mapping.is_broken());
}

#[test]
fn what_is_no_memory_is_not_mapped() {
    let refused = |fd: OwnedFd, why: &str| {
        let error = Mapping::new(&account(), &fd, 0, 1)
            .err()
            .unwrap_or_else(|| panic!("{why} is mapped"));
        assert!(matches!(error, BadMemory::Refused(_)), "{why}: {error}");
    };
    refused(
        File::open("/proc/self/status").unwrap().into(),
        "a file of procfs",
    );
    refused(File::open("/dev/null").unwrap().into(), "a device");
    refused(File::open("/").unwrap().into(), "a directory");
    refused(std::io::pipe().unwrap().0.into(), "a pipe");
    refused(
        std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        "a socket",
    );
    refused(
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
        "an eventfd",
    );
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    disk.set_len(PAGE as u64).unwrap();
    refused(disk.into(), "a file of a disk");
}

#[test]
fn what_the_file_does_not_have_or_allow_is_not_mapped() {
    let fd = memfd(PAGE as u64);
    for (offset, len) in [
        (0, 0),
        (0, PAGE + 1),
        (1, PAGE),
        (PAGE as u64, 1),
        (u64::MAX, 1),
        (u64::MAX - 10, usize::MAX),
        (1 << 63, 1),
        (0, usize::MAX),
    ] {
        assert!(
            matches!(
                Mapping::new(&account(), &fd, offset, len),
                Err(BadMemory::Refused(_))
            ),
            "{len} at {offset}"
        );
    }
    fcntl_add_seals(&fd, SealFlags::WRITE).unwrap();
    assert!(matches!(
        Mapping::new(&account(), &fd, 0, PAGE),
        Err(BadMemory::Os(..))
    ));
}

/// A mapping of 16 pages of which only the first is left.
fn cut() -> Mapping {
    let fd = memfd(16 * PAGE as u64);
    let mapping = Mapping::new(&account(), &fd, 0, 16 * PAGE).unwrap();
    mapping.write(5 * PAGE, b"here").unwrap();
    ftruncate(&fd, PAGE as u64).unwrap();
    mapping
}

#[test]
fn every_access_to_memory_that_was_cut_off_is_told_and_so_are_all_after_it() {
    let neighbour_fd = memfd(PAGE as u64);
    let neighbour = Mapping::new(&account(), &neighbour_fd, 0, PAGE).unwrap();
    neighbour.write(0, b"untouched").unwrap();
    let at = 5 * PAGE;
    type Access = fn(&Mapping, usize) -> Result<(), Fault>;
    let accesses: [(&str, Access); 11] = [
        ("a short read", |m, at| m.read(at, &mut [0; 100])),
        ("a long read", |m, at| m.read(at - 100, &mut vec![0; 3 * PAGE])),
        ("a short write", |m, at| m.write(at + 1, &[1; 100])),
        ("a long write", |m, at| m.write(at - 100, &vec![1; 3 * PAGE])),
        ("a load of 8 bits", |m, at| m.load_u8(at).map(drop)),
        ("a load of 16 bits", |m, at| m.load_u16(at).map(drop)),
        ("a load of 64 bits", |m, at| m.load_u64(at).map(drop)),
        ("a store of 16 bits", |m, at| m.store_u16(at, 1)),
        ("a store of 32 bits", |m, at| m.store_u32(at, 1)),
        ("a store of 64 bits", |m, at| m.store_u64(at, 1)),
        ("bits set", |m, at| m.set_bits(at, 1)),
    ];
    for (what, access) in accesses {
        let mapping = cut();
        mapping.read(0, &mut [0; 10]).unwrap();
        assert!(!mapping.is_broken(), "{what}: nothing has been touched");
        assert_eq!(access(&mapping, at), Err(Fault::Gone), "{what}");
        assert!(mapping.is_broken(), "{what}");
        // The page that is left is no longer it either.
        assert_eq!(mapping.read(0, &mut [0; 10]), Err(Fault::Gone), "{what}");
        assert_eq!(mapping.write(0, &[0; 10]), Err(Fault::Gone), "{what}");
        assert_eq!(access(&mapping, at), Err(Fault::Gone), "{what}");
    }
    let mut out = [0; 9];
    neighbour.read(0, &mut out).unwrap();
    assert_eq!(&out, b"untouched");
}

#[test]
fn memory_that_is_cut_off_during_a_copy_harms_neither_this_thread_nor_others() {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Another tenant, whose copies go on all the time and are right.
        scope.spawn(|| {
            let fd = memfd(64 * PAGE as u64);
            let mapping = Mapping::new(&account(), &fd, 0, 64 * PAGE).unwrap();
            let mut out = vec![0; 64 * PAGE];
            let mut rounds = 0_u8;
            while !done.load(Ordering::Relaxed) || rounds == 0 {
                rounds = rounds.wrapping_add(1);
                mapping.write(0, &vec![rounds; 64 * PAGE]).unwrap();
                mapping.read(0, &mut out).unwrap();
                assert!(out.iter().all(|byte| *byte == rounds));
            }
        });
        for round in 0..50 {
            let fd = memfd(256 * PAGE as u64);
            let mapping = Mapping::new(&account(), &fd, 0, 256 * PAGE).unwrap();
            let mut out = vec![0; 256 * PAGE];
            let begun = std::sync::Barrier::new(2);
            std::thread::scope(|cutting| {
                let (fd, begun) = (&fd, &begun);
                cutting.spawn(move || {
                    begun.wait();
                    ftruncate(fd, (round % 7) * PAGE as u64).unwrap();
                });
                begun.wait();
                // Ends when the cut is met.
                loop {
                    let result = match round % 2 {
                        0 => mapping.read(0, &mut out),
                        _ => mapping.write(0, &out),
                    };
                    if let Err(fault) = result {
                        assert_eq!(fault, Fault::Gone);
                        break;
                    }
                }
            });
            assert!(mapping.is_broken());
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn two_mappings_of_one_file_break_each_for_itself() {
    let fd = memfd(2 * PAGE as u64);
    let first = Mapping::new(&account(), &fd, 0, 2 * PAGE).unwrap();
    let second = Mapping::new(&account(), &fd, 0, 2 * PAGE).unwrap();
    ftruncate(&fd, PAGE as u64).unwrap();
    assert_eq!(first.load_u8(PAGE), Err(Fault::Gone));
    assert_eq!((second.load_u8(0), second.is_broken()), (Ok(0), false));
    assert_eq!(second.load_u8(PAGE), Err(Fault::Gone));
    // What stands in the place of a broken mapping goes with it, and a new one is whole.
    drop((first, second));
    let third = Mapping::new(&account(), &fd, 0, PAGE).unwrap();
    assert_eq!((third.load_u8(0), third.is_broken()), (Ok(0), false));
}

#[test]
fn huge_pages_that_there_are_not_break_their_mapping_alone() {
    const HUGE: usize = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(fd) = memfd_create("huge", flags) else {
        eprintln!("this kernel has no huge pages of 2 MiB: nothing to see");
        return;
    };
    ftruncate(&fd, 2 * HUGE as u64).unwrap();
    // An offset inside a page of it.
    let mapping = Mapping::new(&account(), &fd, 4096, HUGE).unwrap();
    let result = mapping.write(HUGE - 8192, &[1; 8192]);
    assert!(matches!(result, Ok(()) | Err(Fault::Gone)), "{result:?}");
    ftruncate(&fd, 0).unwrap();
    assert_eq!(mapping.load_u8(0), Err(Fault::Gone));
}

#[test]
fn mappings_that_go_leave_their_place_to_others() {
    let fd = memfd(PAGE as u64);
    let account = account();
    for _ in 0..libvol::limits::VHOST_MAPPINGS_MAX + 10 {
        // Those before are being unmapped.
        while Mapping::new(&account, &fd, 0, 1).is_err() {
            std::thread::yield_now();
        }
    }
}

#[test]
fn what_an_attachment_has_mapped_is_bounded_and_counts_until_it_is_unmapped() {
    let fd = memfd(PAGE as u64);
    let (account, other) = (account(), account());
    let max = libvol::limits::VHOST_ATTACHMENT_MAPPINGS_MAX;
    let kept: Vec<_> = (0..max)
        .map(|_| Mapping::new(&account, &fd, 0, 1).unwrap())
        .collect();
    let refused = Mapping::new(&account, &fd, 0, 1);
    assert!(matches!(refused, Err(BadMemory::Refused(_))));
    Mapping::new(&other, &fd, 0, 1).unwrap();
    drop(kept);
    while Mapping::new(&account, &fd, 0, 1).is_err() {
        std::thread::yield_now();
    }
}

/// What `/proc/self/maps` has of an address.
fn map_line(address: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let has = |line: &str| {
        let (start, rest) = line.split_once('-').unwrap();
        let bounds = [start, rest.split(' ').next().unwrap()].map(|number| usize::from_str_radix(number, 16));
        matches!(bounds, [Ok(start), Ok(end)] if (start..end).contains(&address))
    };
    maps.lines().find(|line| has(line)).map(str::to_owned)
}

#[test]
fn no_more_is_replaced_than_an_access_can_still_touch() {
    const MIB: usize = 1 << 20;
    let fd = memfd(128 * MIB as u64);
    let mapping = Mapping::new(&account(), &fd, 0, 128 * MIB).unwrap();
    let neighbour = Mapping::new(&account(), &fd, 0, 128 * MIB).unwrap();
    ftruncate(&fd, 0).unwrap();
    let is_of_file = |mapping: &Mapping, at: usize| {
        map_line(mapping.base.as_ptr() as usize + at)
            .unwrap()
            .contains("memfd:guest")
    };
    assert_eq!(mapping.write(2 * MIB - 10, &[1; MIB]), Err(Fault::Gone));
    let places = [
        0,
        2 * MIB - PAGE - 1,
        2 * MIB - PAGE,
        34 * MIB - PAGE - 1,
        34 * MIB - PAGE,
    ];
    assert_eq!(
        places.map(|at| is_of_file(&mapping, at)),
        [true, true, false, false, true]
    );
    // What is broken is not accessed any more, which would cost a signal each time.
    assert_eq!(mapping.read(50 * MIB, &mut [0]), Err(Fault::Gone));
    assert!(is_of_file(&mapping, 50 * MIB));
    // At the end of it, no further.
    assert_eq!(neighbour.load_u8(128 * MIB - 1), Err(Fault::Gone));
    assert!(is_of_file(&neighbour, 128 * MIB - PAGE - 1) && !is_of_file(&neighbour, 128 * MIB - 1));
}

#[test]
fn large_mappings_are_unmapped_to_their_end() {
    let fd = memfd_create("large-guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 100 << 20).unwrap();
    let mapping = Mapping::new(&account(), &fd, 0, 100 << 20).unwrap();
    mapping.write(20 << 20, b"touched").unwrap();
    let start = mapping.base.as_ptr() as usize;
    let is_mapped = |at: usize| map_line(start + at).is_some_and(|line| line.contains("memfd:large-guest"));
    assert!(is_mapped(0) && is_mapped((100 << 20) - 1));
    drop(mapping);
    // By another thread, soon.
    while [0, 31, 32, 64, 99].into_iter().any(|mib| is_mapped(mib << 20)) {
        std::thread::yield_now();
    }
}

/// How this test ends as a process of its own; `None` in that process.
fn alone(test: &str) -> Option<std::process::Output> {
    const ASKED: &str = "VOLD_TEST_ALONE";
    if std::env::var_os(ASKED).is_some() {
        return None;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("vhost::mapping::tests::{test}")])
        .env(ASKED, "1")
        .output();
    Some(output.unwrap())
}

/// What a process of its own ends with when all is as it should be.
const AS_EXPECTED: i32 = 33;

/// From now on these system calls of this thread end the process.
fn forbid(calls: &[libc::c_long]) {
    let step = |code: u32, jf, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let ret = libc::BPF_RET | libc::BPF_K;
    let mut steps = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for call in calls {
        steps.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, *call as u32));
        steps.push(step(ret, 0, libc::SECCOMP_RET_KILL_PROCESS));
    }
    steps.push(step(ret, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: sets a flag of this thread, then reads the program, which lives until it has returned.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ),
        ]
    };
    assert_eq!(results, [0, 0]);
}

/// A file system of a front-end's own (FUSE) would never answer.
#[test]
fn the_file_system_of_what_is_no_memory_is_asked_nothing() {
    if let Some(output) = alone("the_file_system_of_what_is_no_memory_is_asked_nothing") {
        assert_eq!(output.status.code(), Some(AS_EXPECTED), "{output:?}");
        return;
    }
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    disk.set_len(PAGE as u64).unwrap();
    let (account, disk) = (account(), disk.into());
    forbid(&[
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_mmap,
    ]);
    let refused = matches!(Mapping::new(&account, &disk, 0, 1), Err(BadMemory::Refused(_)));
    // SAFETY: ends the process; nothing of it is needed any more.
    unsafe { libc::_exit(if refused { AS_EXPECTED } else { 1 }) }
}

/// The last mapping of a file, however small, may give back a whole guest's memory.
#[test]
fn not_even_a_small_mapping_is_unmapped_by_the_thread_that_drops_it() {
    if let Some(output) = alone("not_even_a_small_mapping_is_unmapped_by_the_thread_that_drops_it") {
        assert_eq!(output.status.code(), Some(AS_EXPECTED), "{output:?}");
        return;
    }
    let mapping = Mapping::new(&account(), &memfd(PAGE as u64), 0, 1).unwrap();
    let address = mapping.base.as_ptr() as usize;
    assert!(map_line(address).is_some());
    forbid(&[libc::SYS_munmap]);
    drop(mapping);
    while map_line(address).is_some_and(|line| line.contains("memfd:guest")) {
        std::thread::yield_now();
    }
    // SAFETY: as above.
    unsafe { libc::_exit(AS_EXPECTED) }
}

/// The kernel tells of a broken page that somebody has (BUS_MCEERR_AO): nobody's access was interrupted.
#[test]
fn a_broken_page_that_nobody_accesses_replaces_nothing() {
    if let Some(output) = alone("a_broken_page_that_nobody_accesses_replaces_nothing") {
        assert_eq!(output.status.code(), Some(AS_EXPECTED), "{output:?}");
        return;
    }
    let fd = memfd(PAGE as u64);
    let mapping = Mapping::new(&account(), &fd, 0, 1).unwrap();
    // signo, errno, code, padding, address.
    let mut info = [0_u64; 16];
    info[0] = libc::SIGBUS as u64;
    info[1] = libc::BUS_MCEERR_AO as u64;
    info[2] = mapping.base.as_ptr() as u64;
    // SAFETY: reads as much as it is told is there; the signal is handled before it returns.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            libc::SIGBUS,
            info.as_ptr(),
        )
    };
    assert_eq!((sent, mapping.is_broken(), mapping.load_u8(0)), (0, false, Ok(0)));
    // And signals of accesses are still seen to.
    ftruncate(&fd, 0).unwrap();
    assert_eq!(mapping.load_u8(0), Err(Fault::Gone));
    // SAFETY: as above.
    unsafe { libc::_exit(AS_EXPECTED) }
}

/// A fault of memory that is no mapping of this room.
#[test]
fn a_fault_anywhere_else_still_ends_the_process() {
    let output = alone("a_fault_anywhere_else_still_ends_the_process");
    if output.is_none() {
        let fd = memfd(PAGE as u64);
        // The handler is there.
        drop(cut());
        assert_eq!(cut().load_u8(PAGE), Err(Fault::Gone));
        // SAFETY: a new mapping, placed by the kernel.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(raw, libc::MAP_FAILED);
        ftruncate(&fd, 0).unwrap();
        // SAFETY: the address is mapped; the signal is what is wanted.
        let byte = unsafe { raw.cast::<u8>().read_volatile() };
        panic!("read {byte} of no memory");
    }
    assert_eq!(output.unwrap().status.signal(), Some(libc::SIGBUS));
}
