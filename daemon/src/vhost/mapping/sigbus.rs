//! What happens when a page of a mapping is gone: the signal's handler, and the table by which it knows the mappings.
//!
//! The handler does only what a signal handler may: it reads and writes atomics and maps memory. It finds the mapping that
//! the address is in, marks it broken and puts empty memory in the place of what the access may still touch, and not of more:
//! pages that are there go one by one. The interrupted access is then repeated. A fault anywhere else is left to whoever
//! handled it before, which is the process's end.
//!
//! Invariants: a slot's address range is only live while the mapping is mapped; the access and the handler run on the one
//! thread that owns the mapping, while other threads claim and retire slots of theirs. So a slot is read as live only when
//! its turn is the same before and after.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use libvol::limits::{VHOST_MAPPINGS_MAX, VHOST_PIECE_BYTES_MAX};

use super::BadMemory;

/// What is replaced at once, from the page that is gone on, if that is not larger: as much as a request brings, so as much as
/// one access can still touch.
const REPLACED_BYTES: usize = VHOST_PIECE_BYTES_MAX as usize;

/// A place in the table. Its turn only grows: free, claimed, live, claimed, free, ...
pub(super) struct Slot {
    turn: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    broken: AtomicBool,
}

/// A slot's turn modulo four.
const FREE: usize = 0;
const LIVE: usize = 2;
const TURNS: usize = 4;

static SLOTS: [Slot; VHOST_MAPPINGS_MAX] = [const { Slot::free() }; VHOST_MAPPINGS_MAX];
/// Slots from here on have never been claimed.
static REACHED: AtomicUsize = AtomicUsize::new(0);
/// What was done about SIGBUS before.
static EARLIER: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    const fn free() -> Self {
        Self {
            turn: AtomicUsize::new(FREE),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// A slot for a mapping; `None` when there are too many.
    pub(super) fn claim(start: usize, len: usize, page: usize) -> Option<&'static Self> {
        let (index, slot) = SLOTS.iter().enumerate().find(|(_, slot)| {
            let turn = slot.turn.load(SeqCst);
            turn % TURNS == FREE && slot.turn.compare_exchange(turn, turn + 1, SeqCst, SeqCst).is_ok()
        })?;
        REACHED.fetch_max(index + 1, SeqCst);
        slot.start.store(start, SeqCst);
        slot.len.store(len, SeqCst);
        slot.page.store(page, SeqCst);
        slot.broken.store(false, SeqCst);
        slot.turn.fetch_add(1, SeqCst);
        Some(slot)
    }

    /// The mapping is about to go.
    pub(super) fn retire(&self) {
        self.turn.fetch_add(1, SeqCst);
        self.turn.fetch_add(1, SeqCst);
    }

    /// Whether something stands in the mapping's place.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(SeqCst)
    }

    /// The live slot whose mapping has this address.
    fn find(address: usize) -> Option<&'static Self> {
        SLOTS[..REACHED.load(SeqCst)].iter().find(|slot| {
            let turn = slot.turn.load(SeqCst);
            turn % TURNS == LIVE
                && address.wrapping_sub(slot.start.load(SeqCst)) < slot.len.load(SeqCst)
                && slot.turn.load(SeqCst) == turn
        })
    }

    /// Puts memory where the access goes on. `address` is in the mapping, which has whole pages.
    fn replace(&self, address: usize) -> bool {
        let page = self.page.load(SeqCst);
        let end = self.start.load(SeqCst) + self.len.load(SeqCst);
        let from = address & !(page - 1);
        self.broken.store(true, SeqCst);
        put_memory(from, REPLACED_BYTES.max(page).min(end - from))
    }
}

/// Empty private memory in the place of what is mapped there.
fn put_memory(start: usize, len: usize) -> bool {
    // SAFETY: the range is inside one live mapping, which is the interrupted thread's own and from which nothing is
    // borrowed; the system call is safe in a handler.
    let result = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    result != libc::MAP_FAILED
}

/// Sees to it that the signal is caught from now on.
pub(super) fn catch() -> Result<(), BadMemory> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| install().map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(|errno| {
            BadMemory::Os(
                "the signal of vanished memory cannot be caught",
                io::Error::from_raw_os_error(errno),
            )
        })
}

fn install() -> io::Result<()> {
    // SAFETY: all zero bits are a valid `sigaction`: the default action, no flags, an empty mask.
    let (mut earlier, mut action) = unsafe { (std::mem::zeroed(), std::mem::zeroed::<libc::sigaction>()) };
    // SAFETY: only asks, into a place that lives.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut earlier) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let _ = EARLIER.set(earlier);
    action.sa_sigaction = on_sigbus as *const () as usize;
    // On the alternative stack, where the standard library's handler of stack overflows runs too.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler is of the form that SA_SIGINFO asks for and does only what a handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: this thread's own variable.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid one, and an address in it for what it raises itself; otherwise that is not looked at.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let done = match (code, Slot::find(address)) {
        (libc::BUS_ADRERR | libc::BUS_MCEERR_AR, Some(slot)) => slot.replace(address),
        // A page has broken that nobody is using just now. Whoever comes to it will be told.
        (libc::BUS_MCEERR_AO, Some(_)) => true,
        _ => false,
    };
    // SAFETY: as above.
    unsafe { *errno = saved };
    if !done {
        let is_repeated = matches!(
            code,
            libc::BUS_ADRERR | libc::BUS_MCEERR_AR | libc::BUS_ADRALN | libc::BUS_OBJERR
        );
        as_before(signal, info, context, is_repeated);
    }
}

/// What would have happened without us.
fn as_before(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, is_repeated: bool) {
    let (handler, flags) = EARLIER.get().map_or((libc::SIG_DFL, 0), |earlier| {
        (earlier.sa_sigaction, earlier.sa_flags)
    });
    match handler {
        libc::SIG_IGN if !is_repeated => {}
        // An access is repeated after this, and then it ends the process; what was sent or only told is sent again.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: both calls are safe in a handler.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if !is_repeated {
                    libc::raise(signal);
                }
            }
        }
        _ if flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: the flag says that it has this form.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        _ => {
            // SAFETY: without the flag it has this form.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler) };
            handler(signal);
        }
    }
}
