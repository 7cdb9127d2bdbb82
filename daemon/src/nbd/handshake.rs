//! The handshake: from the greeting to an agreed export (fixed newstyle).
//!
//! Every option gets its replies before the next is read, and an option that is unknown, malformed or too long is
//! answered and skipped, so that the client stays in step. What a client may cost is bounded: options are counted
//! and limited in length, and the caller sets a deadline. A foreign export and a missing one get the same answer.
//! It deliberately keeps no list of exports: it asks [`Exports`] each time, so a detach shows at once.

use std::fmt;
use std::io;

use libvol::ids::VolumeId;
use libvol::limits::{BLOCK_SIZE, NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX, NBD_PAYLOAD_MAX};
use libvol::runtime::SendPart;

use super::inbox::Inbox;
use super::proto::option::{
    ClientFlags, ClientOption, ContextQuery, ExportFlags, ExportQuery, HEADER_BYTES, OptionCode, OptionError,
    OptionHeader, OptionReplies, export_name_reply, greeting,
};
use super::proto::{Contexts, Framing};
use super::session::Seat;
use super::{Export, Exports, Lookup};
use crate::device::Device;

/// The longest option with its header, and as much again for whatever follows.
pub(super) const INBOX_BYTES: usize = 2 * (NBD_OPTION_BYTES_MAX as usize);
/// An option longer than allowed is skipped up to this length, beyond which the connection is dropped.
const SKIP_BYTES_MAX: u32 = 1 << 20;

/// What was agreed.
pub(super) struct Negotiated<D> {
    /// The export.
    pub(super) export: Export<D>,
    /// How requests and replies look.
    pub(super) framing: Framing,
    /// What the client may ask BLOCK_STATUS about.
    pub(super) contexts: Contexts,
}

/// How a handshake ends without an export.
pub(super) enum End {
    /// The client hung up.
    Closed,
    /// It said goodbye.
    Aborted,
    /// It broke the protocol in a way that cannot be answered.
    Violation(&'static str),
    /// It asked by `EXPORT_NAME` for what it does not get, which can only be answered by hanging up.
    Refused(&'static str),
    /// TLS begins here.
    StartTls,
    /// It asks for the export of that volume, which is served elsewhere; the question is kept.
    Elsewhere(VolumeId),
    /// The socket failed.
    Io(io::Error),
}

impl From<io::Error> for End {
    fn from(e: io::Error) -> Self {
        End::Io(e)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Closed => f.write_str("the client hung up"),
            End::Aborted => f.write_str("the client said goodbye"),
            End::Violation(what) => write!(f, "protocol violation: {what}"),
            End::Refused(why) => write!(f, "export refused: {why}"),
            End::StartTls => f.write_str("TLS begins"),
            End::Elsewhere(volume) => write!(f, "goes on with volume {volume}"),
            End::Io(e) => write!(f, "socket: {e}"),
        }
    }
}

/// What there is of TLS on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// There is none here, and none is needed.
    None,
    /// Nothing is told or done before it has begun.
    Required,
    /// It is on.
    On,
}

/// A handshake under way: what the options so far have agreed. It can go on elsewhere.
pub(super) struct Negotiation {
    encryption: Encryption,
    /// Since the greeting.
    flags: Option<ClientFlags>,
    framing: Framing,
    /// The contexts that were chosen, and for which export.
    chosen: Option<(String, Contexts)>,
    options_left: u32,
    /// An option that was asked where it could not be answered.
    asked: Option<(OptionCode, ClientOption)>,
}

impl Negotiation {
    /// Before the greeting.
    pub(super) fn new(encryption: Encryption) -> Self {
        Self {
            encryption,
            flags: None,
            framing: Framing::Simple,
            chosen: None,
            options_left: NBD_OPTIONS_MAX,
            asked: None,
        }
    }

    /// TLS has begun. What was agreed before it may have been somebody else's words.
    pub(super) fn encrypted(self) -> Self {
        Self {
            flags: self.flags,
            options_left: self.options_left,
            ..Self::new(Encryption::On)
        }
    }

    /// Greets the client, if nobody has yet, and haggles until it has chosen an export; then `seat` is claimed and the last
    /// reply is sent. Without a seat there are no exports here, only elsewhere.
    pub(super) async fn run<D: Device>(
        &mut self,
        inbox: &mut Inbox,
        exports: &dyn Exports<D>,
        seat: Option<&Seat>,
    ) -> Result<Negotiated<D>, End> {
        let flags = match self.flags {
            Some(flags) => flags,
            None => {
                send(inbox, greeting().into()).await?;
                let flags = receive::<4>(inbox).await?;
                let flags = ClientFlags::decode(flags).ok_or(End::Violation("unknown client flags"))?;
                *self.flags.insert(flags)
            }
        };
        if let Some((code, option)) = self.asked.take()
            && let Some(negotiated) = self.answer(inbox, code, Ok(option), exports, seat).await?
        {
            return Ok(negotiated);
        }
        while self.options_left > 0 {
            self.options_left -= 1;
            let header = OptionHeader::decode(&receive(inbox).await?);
            let header = header.ok_or(End::Violation("not an option"))?;
            if !flags.fixed_newstyle && header.code != OptionCode::EXPORT_NAME {
                return Err(End::Violation("options without fixed newstyle"));
            }
            let Some(option) = self.receive_option(inbox, header).await? else {
                continue;
            };
            if let Some(negotiated) = self.answer(inbox, header.code, option, exports, seat).await? {
                return Ok(negotiated);
            }
        }
        Err(End::Violation("too many options"))
    }

    /// An option's data, decoded. `None`: it was too long, and has been refused.
    async fn receive_option(
        &self,
        inbox: &mut Inbox,
        header: OptionHeader,
    ) -> Result<Option<Result<ClientOption, &'static str>>, End> {
        let OptionHeader { code, len } = header;
        if len > NBD_OPTION_BYTES_MAX {
            if code == OptionCode::EXPORT_NAME || len > SKIP_BYTES_MAX {
                return Err(End::Violation("an option is too long to skip"));
            }
            if !inbox.skip(len as usize).await? {
                return Err(End::Closed);
            }
            let refused =
                OptionReplies::to(code).error(OptionError::TooBig, "the option is longer than 16 KiB");
            send(inbox, refused.into_bytes()).await?;
            return Ok(None);
        }
        if !inbox.fill(len as usize).await? {
            return Err(End::Closed);
        }
        let option = ClientOption::decode(code, &inbox.bytes()[..len as usize]);
        inbox.consume(len as usize);
        Ok(Some(option))
    }

    /// Why an option is refused whatever it says.
    fn barred(&self, code: OptionCode, seat: Option<&Seat>) -> Option<(OptionError, &'static str)> {
        if code == OptionCode::ABORT {
            return None;
        }
        if self.encryption == Encryption::Required && code != OptionCode::STARTTLS {
            return Some((OptionError::TlsRequired, "begin TLS first"));
        }
        seat.is_some_and(Seat::draining)
            .then_some((OptionError::Shutdown, "the server is shutting down"))
    }

    async fn answer<D: Device>(
        &mut self,
        inbox: &mut Inbox,
        code: OptionCode,
        option: Result<ClientOption, &'static str>,
        exports: &dyn Exports<D>,
        seat: Option<&Seat>,
    ) -> Result<Option<Negotiated<D>>, End> {
        let replies = OptionReplies::to(code);
        if let Some((error, why)) = self.barred(code, seat) {
            if code == OptionCode::EXPORT_NAME {
                return Err(End::Refused(why));
            }
            send(inbox, replies.error(error, why).into_bytes()).await?;
            return Ok(None);
        }
        let export = match option.as_ref().ok().and_then(ClientOption::export) {
            None => None,
            Some(name) => match find(exports, name) {
                Lookup::Here(export) => Some(export),
                Lookup::Missing => None,
                Lookup::Elsewhere(volume) => {
                    self.asked = option.ok().map(|option| (code, option));
                    return Err(End::Elsewhere(volume));
                }
            },
        };
        let claim = || seat.is_some_and(Seat::claim);
        let replies = match option {
            Err(_) if code == OptionCode::EXPORT_NAME => return Err(End::Refused("a malformed name")),
            Err(why) => {
                if code == OptionCode::SET_META_CONTEXT {
                    self.chosen = None;
                }
                replies.error(OptionError::Invalid, why)
            }
            Ok(ClientOption::ExportName(_)) => {
                let export = export.ok_or(End::Refused("no such export"))?;
                if !claim() {
                    return Err(End::Refused("too many connections"));
                }
                let size_bytes = export.volume.size_bytes();
                let no_zeroes = self.flags.is_some_and(|flags| flags.no_zeroes);
                let reply = export_name_reply(size_bytes, self.export_flags(&export), no_zeroes);
                send(inbox, reply).await?;
                return Ok(Some(self.agreed(export)));
            }
            Ok(ClientOption::Abort) => {
                // The client may not wait for it.
                let _ = send(inbox, replies.ack().into_bytes()).await;
                return Err(End::Aborted);
            }
            Ok(ClientOption::List) => {
                let list = exports.list();
                let listed = list.iter().fold(replies, |replies, (name, description)| {
                    replies.server(name, description)
                });
                listed.ack()
            }
            Ok(ClientOption::Info(query)) => match export {
                Some(export) => self.describe(replies, &query, &export).ack(),
                None => replies.error(OptionError::Unknown, NO_SUCH_EXPORT),
            },
            Ok(ClientOption::Go(query)) => match export {
                Some(_) if !claim() => replies.error(
                    OptionError::Policy,
                    "the attachment has all the connections it may have",
                ),
                Some(export) => {
                    let replies = self.describe(replies, &query, &export).ack();
                    send(inbox, replies.into_bytes()).await?;
                    return Ok(Some(self.agreed(export)));
                }
                None => replies.error(OptionError::Unknown, NO_SUCH_EXPORT),
            },
            Ok(ClientOption::StructuredReply) => match self.framing {
                Framing::Simple => {
                    self.framing = Framing::Structured;
                    replies.ack()
                }
                Framing::Structured => replies.ack(),
                Framing::Extended => replies.error(
                    OptionError::ExtendedHeaders,
                    "extended headers are agreed, and all replies structured with them",
                ),
            },
            Ok(ClientOption::ExtendedHeaders) => {
                self.framing = Framing::Extended;
                replies.ack()
            }
            Ok(ClientOption::ListMetaContext(query)) => self.list_contexts(replies, &query, export.is_some()),
            Ok(ClientOption::SetMetaContext(query)) => self.set_contexts(replies, &query, export),
            Ok(ClientOption::StartTls) => match self.encryption {
                Encryption::None => replies.error(OptionError::Policy, "this socket is not served over TLS"),
                Encryption::On => replies.error(OptionError::Invalid, "TLS is on already"),
                Encryption::Required => {
                    // Whatever comes before the answer is somebody's who wants it to be taken for the client's.
                    if !inbox.bytes().is_empty() {
                        return Err(End::Violation("bytes between STARTTLS and its answer"));
                    }
                    send(inbox, replies.ack().into_bytes()).await?;
                    return Err(End::StartTls);
                }
            },
            Ok(ClientOption::Unknown) => {
                replies.error(OptionError::Unsupported, "this server does not know the option")
            }
        };
        send(inbox, replies.into_bytes()).await?;
        Ok(None)
    }

    fn export_flags<D>(&self, export: &Export<D>) -> ExportFlags {
        ExportFlags::new(export.read_only, self.framing)
    }

    fn describe<D: Device>(
        &self,
        replies: OptionReplies,
        query: &ExportQuery,
        export: &Export<D>,
    ) -> OptionReplies {
        let flags = self.export_flags(export);
        let mut replies = replies.info_export(export.volume.size_bytes(), flags);
        if query.wants_name {
            replies = replies.info_name(&export.name);
        }
        if query.wants_description {
            replies = replies.info_description(&export.description);
        }
        if query.wants_block_size {
            replies = replies.info_block_size(1, BLOCK_SIZE as u32, NBD_PAYLOAD_MAX);
        }
        replies
    }

    fn list_contexts(&self, replies: OptionReplies, query: &ContextQuery, is_export: bool) -> OptionReplies {
        if self.framing == Framing::Simple {
            return replies.error(OptionError::Invalid, "negotiate structured replies first");
        }
        if !is_export {
            return replies.error(OptionError::Unknown, NO_SUCH_EXPORT);
        }
        let found = match query.without_queries {
            true => Contexts::all(),
            false => query.named.or(query.wildcard),
        };
        let listed = found.iter().fold(replies, |replies, context| {
            replies.meta_context(0, context.name())
        });
        listed.ack()
    }

    fn set_contexts<D>(
        &mut self,
        replies: OptionReplies,
        query: &ContextQuery,
        export: Option<Export<D>>,
    ) -> OptionReplies {
        // Whatever comes of it, what was chosen before is gone.
        self.chosen = None;
        if self.framing == Framing::Simple {
            return replies.error(OptionError::Invalid, "negotiate structured replies first");
        }
        let Some(export) = export else {
            return replies.error(OptionError::Unknown, NO_SUCH_EXPORT);
        };
        self.chosen = Some((export.name, query.named));
        let set = query.named.iter().fold(replies, |replies, context| {
            replies.meta_context(context as u32, context.name())
        });
        set.ack()
    }

    /// Contexts chosen for another export do not count.
    fn agreed<D>(&self, export: Export<D>) -> Negotiated<D> {
        let chosen = self.chosen.as_ref().filter(|(name, _)| *name == export.name);
        Negotiated {
            framing: self.framing,
            contexts: chosen.map_or_else(Contexts::default, |(_, contexts)| *contexts),
            export,
        }
    }
}

/// The same words for an export that is missing and for one that is somebody else's.
const NO_SUCH_EXPORT: &str = "no export of that name here; ask for the list";

/// The empty name is the default export: the only one there is, if there is only one.
fn find<D>(exports: &dyn Exports<D>, name: &str) -> Lookup<D> {
    match exports.find(name) {
        Lookup::Missing => match exports.list().as_slice() {
            [(only, _)] if name.is_empty() => exports.find(only),
            _ => Lookup::Missing,
        },
        found => found,
    }
}

async fn receive<const N: usize>(inbox: &mut Inbox) -> Result<[u8; N], End> {
    if !inbox.fill(N).await? {
        return Err(End::Closed);
    }
    let bytes = *inbox.bytes().first_chunk::<N>().expect("filled");
    inbox.consume(N);
    Ok(bytes)
}

async fn send(inbox: &Inbox, bytes: Box<[u8]>) -> io::Result<()> {
    inbox.link().send(vec![SendPart::Bytes(bytes)]).await
}

const _: () = assert!(HEADER_BYTES + NBD_OPTION_BYTES_MAX as usize <= INBOX_BYTES);
