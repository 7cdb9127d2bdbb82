//! What the data path's arithmetic costs: nanoseconds per 4 KiB block for the cipher, the sum, seal and open.
//!
//! `cargo run --release -p vold-benches --bin crypto`. Each figure is the best of several rounds over a buffer that fits
//! the first- or second-level cache, as a block just received or just read does.

use std::hint::black_box;
use std::time::Instant;

use libvol::buf::Buf;
use libvol::crypto::seal::{PlainBuf, Sealer, block_sum, verify_block};
use libvol::crypto::xts::Xts;
use libvol::ids::{BlockIndex, DatasetId};
use libvol::limits::BLOCK_SIZE;
use libvol::secret::Secret;

const ROUNDS: usize = 15;
const BLOCKS_PER_ROUND: usize = 8192;

fn main() {
    let key = Secret::<64>::random().expect("key memory");
    let dataset = DatasetId::random();
    let sealer = Sealer::new(dataset, &key).expect("cipher");
    let xts = Xts::new(&key).expect("cipher");
    let mut block = [0x5au8; BLOCK_SIZE];

    println!("{:<44} {:>10} {:>8}", "one 4 KiB block", "ns", "GB/s");
    row("xts encrypt", 1, |i| {
        xts.encrypt(BlockIndex(i as u64), &mut block)
    });
    row("xts decrypt", 1, |i| {
        xts.decrypt(BlockIndex(i as u64), &mut block)
    });
    row("crc-fast, crc32_iscsi", 1, |_| {
        black_box(crc_fast::crc32_iscsi(black_box(&block)));
    });
    row("crc32c", 1, |_| {
        black_box(crc32c::crc32c(black_box(&block)));
    });
    row("block_sum (dataset, number, ciphertext)", 1, |i| {
        black_box(block_sum(dataset, BlockIndex(i as u64), black_box(&block)));
    });
    let zeros = [0u8; BLOCK_SIZE];
    row("verify a hole (4 KiB of zeros)", 1, |_| {
        assert!(verify_block(dataset, BlockIndex(0), black_box(&zeros), 0));
    });
    for blocks in [1, 4, 32, 256] {
        let mut sums = vec![0u32; blocks];
        let mut memory = Some(Buf::zeroed(blocks * BLOCK_SIZE));
        row(
            &format!("seal, in requests of {} KiB", blocks * 4),
            blocks,
            |_| {
                let plain = PlainBuf(memory.take().expect("back each time"));
                let sealed = sealer.seal(BlockIndex(7), plain, &mut sums).shared();
                memory = std::rc::Rc::into_inner(sealed);
            },
        );
        // Opening in place turns ciphertext into plaintext, so each round seals first; its cost is taken off.
        let mut both = |rounds: usize, open: bool| {
            let start = Instant::now();
            for _ in 0..rounds {
                let plain = PlainBuf(memory.take().expect("back each time"));
                let sealed = sealer.seal(BlockIndex(7), plain, &mut sums).shared();
                let sealed = std::rc::Rc::into_inner(sealed).expect("not shared");
                memory = Some(if open {
                    sealer.open(BlockIndex(7), sealed, &sums).expect("good sums").0
                } else {
                    sealed
                });
            }
            start.elapsed().as_nanos() as f64 / (rounds * blocks) as f64
        };
        let rounds = BLOCKS_PER_ROUND / blocks;
        let best = |f: &mut dyn FnMut() -> f64| (0..ROUNDS).map(|_| f()).fold(f64::MAX, f64::min);
        let with = best(&mut || both(rounds, true));
        let without = best(&mut || both(rounds, false));
        print_row(
            &format!("open, in requests of {} KiB", blocks * 4),
            with - without,
        );
    }
}

/// Best time per block of `work`, which handles `blocks` blocks a call.
fn row(name: &str, blocks: usize, mut work: impl FnMut(usize)) {
    let calls = BLOCKS_PER_ROUND / blocks;
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for i in 0..calls {
            work(i);
        }
        best = best.min(start.elapsed().as_nanos() as f64 / (calls * blocks) as f64);
    }
    print_row(name, best);
}

fn print_row(name: &str, ns: f64) {
    println!("{name:<44} {ns:>10.1} {:>8.1}", BLOCK_SIZE as f64 / ns);
}
