//! What a daemon has open, holds in memory and carries, as the kernel and `volctl status` tell it.

use crate::{Vold, wait_for};

/// At one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Tasks of the data plane.
    pub tasks: u64,
    /// NBD connections, those in their handshake included.
    pub connections: u64,
    /// Resident memory.
    pub resident_bytes: u64,
}

impl Load {
    /// Now.
    pub fn of(vold: &Vold) -> Self {
        let status = vold.ctl("status");
        let number = |field: &str| status[field].as_u64().expect("a number");
        Self {
            descriptors: descriptors(vold),
            threads: of_status(vold, "Threads:") as usize,
            tasks: number("tasks"),
            connections: number("connections") + number("handshakes"),
            resident_bytes: of_status(vold, "VmRSS:") << 10,
        }
    }

    /// Waits until the daemon has no more open, and carries no more, than it had in `before`, memory aside; gives what it has.
    pub fn back_to(before: Self, vold: &Vold) -> Self {
        let mut last = Self::of(vold);
        wait_for(&format!("the daemon is back at {before:?}"), || {
            last = Self::of(vold);
            let is_back = last.connections <= before.connections
                && last.tasks <= before.tasks
                && last.descriptors <= before.descriptors;
            if !is_back {
                println!("not back yet: {last:?}");
            }
            is_back.then_some(last)
        })
    }
}

fn descriptors(vold: &Vold) -> usize {
    let dir = format!("/proc/{}/fd", vold.pid());
    std::fs::read_dir(dir).expect("the daemon runs").count()
}

/// A number of `/proc/PID/status`.
fn of_status(vold: &Vold, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vold.pid())).expect("the daemon runs");
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).expect("a number")
}

/// Processor time that the daemon has used, all threads together, in clock ticks.
pub fn processor_ticks(vold: &Vold) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", vold.pid())).expect("the daemon runs");
    // The second field is the name in parentheses; user and system time are the 14th and the 15th.
    let (_, after) = stat.rsplit_once(')').expect("a name in parentheses");
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks = |index: usize| fields[index].parse::<u64>().expect("a number");
    ticks(11) + ticks(12)
}
