//! A handshake foreseen: which replies a client's options have to get, and what is agreed in the end. A second reading of
//! the protocol, written apart from the server's, numbers included.

use super::device::SIZE_BYTES;
use super::script::{ALLOCATION, DEPTH, Terms, be16, be32, be64};
use crate::nbd::proto::Framing;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_CONTEXTS: u32 = 9;
const SET_CONTEXTS: u32 = 10;
const EXTENDED: u32 = 11;

const ACK: u32 = 1;
const UNSUPPORTED: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQUIRED: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;
const EXTENDED_ALREADY: u32 = 0x8000_000a;

/// What there is of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    None,
    Required,
    On,
}

/// Name, and whether it is read-only.
pub(super) type Shown = &'static [(&'static str, bool)];

/// Where a handshake starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub(super) tls: Tls,
    /// What this client may see.
    pub(super) shown: Shown,
    /// Client flags, if they were said before.
    pub(super) flags: Option<u32>,
    pub(super) options_left: usize,
}

/// How it goes.
#[derive(Debug)]
pub(super) struct Foreseen {
    /// Replies in their order, the greeting not among them.
    pub(super) answers: Vec<Answer>,
    /// An export was agreed on: which, and the terms.
    pub(super) agreed: Option<(&'static str, Terms)>,
    /// TLS begins.
    pub(super) starts_tls: bool,
    /// Bytes of the client's that belong to it.
    pub(super) used: usize,
}

/// What has to come of one option.
#[derive(Debug)]
pub(super) enum Answer {
    /// Replies, the last of this type.
    Replies { option: u32, last: u32, before: Before },
    /// The short reply to EXPORT_NAME.
    ExportName {
        read_only: bool,
        framing: Framing,
        zeroes: bool,
    },
}

/// Replies before the last.
#[derive(Debug, Default)]
pub(super) struct Before {
    names: Vec<&'static str>,
    /// Read-only, framing, and the kinds of information.
    infos: Option<(bool, Framing, Vec<u16>)>,
    /// Ids and names.
    contexts: Vec<(u32, &'static str)>,
}

struct State {
    start: Start,
    framing: Framing,
    zeroes: bool,
    chosen: Option<(&'static str, u8)>,
}

/// What the next option leads to.
enum Step {
    Answer(u32, Before),
    Close,
    Last(u32),
    Agreed(&'static str, bool, Before),
    StartTls,
}

impl Foreseen {
    /// Of a client's bytes after the greeting.
    pub(super) fn of(bytes: &[u8], start: Start) -> Self {
        let mut foreseen = Self {
            answers: Vec::new(),
            agreed: None,
            starts_tls: false,
            used: bytes.len(),
        };
        let mut at = 0;
        let flags = match (start.flags, bytes.first_chunk::<4>()) {
            (Some(flags), _) => flags,
            (None, None) => return foreseen,
            (None, Some(flags)) => {
                at = 4;
                u32::from_be_bytes(*flags)
            }
        };
        if flags > 3 {
            return foreseen;
        }
        let mut state = State {
            start,
            framing: Framing::Simple,
            zeroes: flags & 2 == 0,
            chosen: None,
        };
        for _ in 0..start.options_left {
            let Some(head) = bytes.get(at..at + 16) else {
                return foreseen;
            };
            let (code, len) = (be32(&head[8..]), be32(&head[12..]) as usize);
            let too_long = len > 16 << 10;
            if head[..8] != *b"IHAVEOPT"
                || flags & 1 == 0 && code != EXPORT_NAME
                || too_long && (code == EXPORT_NAME || len > 1 << 20)
            {
                return foreseen;
            }
            let Some(data) = bytes.get(at + 16..at + 16 + len) else {
                return foreseen;
            };
            at += 16 + len;
            let step = match too_long {
                true => Step::Answer(TOO_BIG, Before::default()),
                false => state.step(code, data),
            };
            let (last, before) = match step {
                Step::Close => return foreseen,
                Step::Answer(last, before) => (last, before),
                Step::Last(last) => {
                    foreseen.answers.push(Answer::of(code, last, Before::default()));
                    return foreseen;
                }
                Step::StartTls => {
                    foreseen.answers.push(Answer::of(code, ACK, Before::default()));
                    (foreseen.starts_tls, foreseen.used) = (true, at);
                    return foreseen;
                }
                Step::Agreed(name, read_only, before) => {
                    let answer = match code {
                        GO => Answer::of(code, ACK, before),
                        _ => Answer::ExportName {
                            read_only,
                            framing: state.framing,
                            zeroes: state.zeroes,
                        },
                    };
                    foreseen.answers.push(answer);
                    foreseen.agreed = Some((name, state.terms(name, read_only)));
                    foreseen.used = at;
                    return foreseen;
                }
            };
            foreseen.answers.push(Answer::of(code, last, before));
        }
        foreseen
    }
}

impl State {
    fn terms(&self, name: &str, read_only: bool) -> Terms {
        let chosen = self.chosen.filter(|(export, _)| *export == name);
        Terms {
            framing: self.framing,
            read_only,
            contexts: chosen.map_or(0, |(_, contexts)| contexts),
            size_bytes: SIZE_BYTES,
            failing: false,
        }
    }

    fn find(&self, name: &str) -> Option<(&'static str, bool)> {
        match self.start.shown {
            [only] if name.is_empty() => Some(*only),
            shown => shown.iter().find(|(shown, _)| *shown == name).copied(),
        }
    }

    fn step(&mut self, code: u32, data: &[u8]) -> Step {
        let answer = |last| Step::Answer(last, Before::default());
        let empty = data.is_empty();
        if self.start.tls == Tls::Required && !matches!(code, ABORT | STARTTLS) {
            return match code {
                EXPORT_NAME => Step::Close,
                _ => answer(TLS_REQUIRED),
            };
        }
        match code {
            EXPORT_NAME => match string(data).and_then(|name| self.find(name)) {
                Some((name, read_only)) => Step::Agreed(name, read_only, Before::default()),
                None => Step::Close,
            },
            ABORT => Step::Last(ACK),
            LIST | STARTTLS | STRUCTURED | EXTENDED if !empty => answer(INVALID),
            LIST => Step::Answer(
                ACK,
                Before {
                    names: self.start.shown.iter().map(|(name, _)| *name).collect(),
                    ..Before::default()
                },
            ),
            STARTTLS => match self.start.tls {
                Tls::None => answer(POLICY),
                Tls::On => answer(INVALID),
                Tls::Required => Step::StartTls,
            },
            STRUCTURED if self.framing == Framing::Extended => answer(EXTENDED_ALREADY),
            STRUCTURED => {
                self.framing = Framing::Structured;
                answer(ACK)
            }
            EXTENDED => {
                self.framing = Framing::Extended;
                answer(ACK)
            }
            INFO | GO => self.info(code, data),
            LIST_CONTEXTS | SET_CONTEXTS => self.contexts(code, data),
            _ => answer(UNSUPPORTED),
        }
    }

    fn info(&self, code: u32, data: &[u8]) -> Step {
        let answer = |last| Step::Answer(last, Before::default());
        let parsed = (|| {
            let (name, rest) = counted(data)?;
            let (count, wanted) = rest.split_first_chunk::<2>()?;
            (wanted.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some((name, wanted))
        })();
        let Some((name, wanted)) = parsed else {
            return answer(INVALID);
        };
        let Some((name, read_only)) = self.find(name) else {
            return answer(UNKNOWN);
        };
        let wanted: Vec<u16> = wanted.chunks(2).map(be16).collect();
        let mut kinds = vec![0];
        kinds.extend([1, 2, 3].into_iter().filter(|kind| wanted.contains(kind)));
        let before = Before {
            infos: Some((read_only, self.framing, kinds)),
            ..Before::default()
        };
        match code {
            GO => Step::Agreed(name, read_only, before),
            _ => Step::Answer(ACK, before),
        }
    }

    fn contexts(&mut self, code: u32, data: &[u8]) -> Step {
        let answer = |last| Step::Answer(last, Before::default());
        let set = code == SET_CONTEXTS;
        if set {
            self.chosen = None;
        }
        let parsed = (|| {
            let (name, rest) = counted(data)?;
            let (count, mut rest) = rest.split_first_chunk::<4>()?;
            let mut asked = Vec::new();
            for _ in 0..u32::from_be_bytes(*count) {
                let (query, behind) = counted(rest)?;
                asked.push(query);
                rest = behind;
            }
            rest.is_empty().then_some((name, asked))
        })();
        let Some((name, asked)) = parsed else {
            return answer(INVALID);
        };
        if self.framing == Framing::Simple {
            return answer(INVALID);
        }
        let Some((name, _)) = self.find(name) else {
            return answer(UNKNOWN);
        };
        let known = [
            (ALLOCATION, 1, "base:allocation", "base:"),
            (DEPTH, 2, "qemu:allocation-depth", "qemu:"),
        ];
        let meant = known.into_iter().filter(|(_, _, whole, namespace)| {
            asked.contains(whole) || !set && (asked.is_empty() || asked.contains(namespace))
        });
        let meant: Vec<_> = meant.collect();
        if set {
            self.chosen = Some((name, meant.iter().fold(0, |bits, (bit, ..)| bits | bit)));
        }
        let contexts = meant
            .into_iter()
            .map(|(_, id, whole, _)| (if set { id } else { 0 }, whole));
        Step::Answer(
            ACK,
            Before {
                contexts: contexts.collect(),
                ..Before::default()
            },
        )
    }
}

/// A length and as many bytes of text.
fn counted(data: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((string(text)?, rest))
}

fn string(bytes: &[u8]) -> Option<&str> {
    let text = str::from_utf8(bytes).ok()?;
    (text.len() <= 4096 && !text.contains('\0')).then_some(text)
}

impl Answer {
    fn of(option: u32, last: u32, before: Before) -> Self {
        Self::Replies { option, last, before }
    }

    /// Reads this answer off the front of what the server said; what is left.
    pub(super) fn check<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        match self {
            Self::ExportName {
                read_only,
                framing,
                zeroes,
            } => {
                let len = if *zeroes { 134 } else { 10 };
                let (answer, rest) = bytes.split_at_checked(len).expect("an answer to EXPORT_NAME");
                assert_eq!(be64(answer), SIZE_BYTES);
                check_flags(be16(&answer[8..]), *read_only, *framing);
                assert!(answer[10..].iter().all(|byte| *byte == 0));
                rest
            }
            Self::Replies { option, last, before } => {
                let mut rest = bytes;
                let mut seen = Before::default();
                loop {
                    let (kind, data, behind) = reply(*option, rest);
                    rest = behind;
                    if kind == *last {
                        assert!(kind != ACK || data.is_empty());
                        break;
                    }
                    seen.note(kind, data, before);
                }
                assert_eq!(seen.names, before.names, "the list");
                assert_eq!(seen.contexts, before.contexts, "the contexts");
                let kinds = |side: &Before| side.infos.as_ref().map(|(_, _, kinds)| kinds.clone());
                assert_eq!(kinds(&seen), kinds(before), "the information");
                rest
            }
        }
    }
}

/// Type and data of the reply at the front, and what is behind it.
fn reply(option: u32, bytes: &[u8]) -> (u32, &[u8], &[u8]) {
    let (head, rest) = bytes
        .split_at_checked(20)
        .unwrap_or_else(|| panic!("no whole reply to option {option}: {bytes:02x?}"));
    assert_eq!(
        head[..8],
        [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9],
        "a reply's magic"
    );
    assert_eq!(be32(&head[8..]), option, "a reply to another option");
    let (data, rest) = rest
        .split_at_checked(be32(&head[16..]) as usize)
        .expect("a reply's data");
    (be32(&head[12..]), data, rest)
}

impl Before {
    fn note(&mut self, kind: u32, data: &[u8], expected: &Self) {
        match kind {
            2 => {
                let (name, _) = counted(data).expect("a name");
                let known = expected.names.iter().find(|known| **known == name);
                self.names
                    .push(known.unwrap_or_else(|| panic!("{name:?} is listed")));
            }
            3 => {
                let (read_only, framing, _) = expected.infos.as_ref().expect("information was asked for");
                let about = be16(data);
                match about {
                    0 => {
                        assert_eq!((data.len(), be64(&data[2..])), (12, SIZE_BYTES));
                        check_flags(be16(&data[10..]), *read_only, *framing);
                    }
                    3 => assert_eq!(
                        [be32(&data[2..]), be32(&data[6..]), be32(&data[10..])],
                        [1, 4096, 32 << 20]
                    ),
                    _ => {}
                }
                let (_, _, kinds) = self
                    .infos
                    .get_or_insert_with(|| (*read_only, *framing, Vec::new()));
                kinds.push(about);
            }
            4 => {
                let name = str::from_utf8(&data[4..]).expect("a context's name");
                let known = expected.contexts.iter().find(|(_, known)| *known == name);
                let (_, known) = known.unwrap_or_else(|| panic!("context {name:?}"));
                self.contexts.push((be32(data), known));
            }
            other => panic!("a reply of type {other:#x} instead of {expected:?}"),
        }
    }
}

fn check_flags(flags: u16, read_only: bool, framing: Framing) {
    assert_eq!(flags & 1, 1, "there are flags");
    assert_eq!(flags & 2 != 0, read_only, "read-only");
    assert_eq!(
        flags & 1 << 7 != 0,
        framing != Framing::Simple,
        "unfragmented reads"
    );
    assert_eq!(
        flags & 1 << 12 != 0,
        framing == Framing::Extended,
        "payload of BLOCK_STATUS"
    );
}
