//! Options of the handshake: what a client asks for, and the replies to it.
//!
//! ```text
//! option: | "IHAVEOPT" u64 | option u32 | length u32 | data |
//! reply:  | magic u64 | option u32 | type u32 | length u32 | data |
//! ```

use super::reply::clip;
use super::{Context, Contexts, Fields, Framing, Writer};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;
const CLIENT_FIXED_NEWSTYLE: u32 = 1;
const CLIENT_NO_ZEROES: u32 = 2;

/// Bytes of an option before its data: 8 + 4 + 4.
pub(in crate::nbd) const HEADER_BYTES: usize = 16;
/// Longest string of the protocol.
const STRING_BYTES_MAX: usize = 4096;

/// Transmission flags: what an export can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct ExportFlags(u16);

impl ExportFlags {
    /// Everything this server does; unfragmented reads exist only with structured replies, BLOCK_STATUS for some of the
    /// contexts only with extended headers.
    pub(in crate::nbd) fn new(read_only: bool, framing: Framing) -> Self {
        const HAS_FLAGS: u16 = 1 << 0;
        const READ_ONLY: u16 = 1 << 1;
        const SEND_FLUSH: u16 = 1 << 2;
        const SEND_FUA: u16 = 1 << 3;
        const SEND_TRIM: u16 = 1 << 5;
        const SEND_WRITE_ZEROES: u16 = 1 << 6;
        const SEND_DF: u16 = 1 << 7;
        const CAN_MULTI_CONN: u16 = 1 << 8;
        const SEND_CACHE: u16 = 1 << 10;
        const SEND_FAST_ZERO: u16 = 1 << 11;
        const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
        let mut flags = HAS_FLAGS
            | SEND_FLUSH
            | SEND_FUA
            | SEND_TRIM
            | SEND_WRITE_ZEROES
            | CAN_MULTI_CONN
            | SEND_CACHE
            | SEND_FAST_ZERO;
        if read_only {
            flags |= READ_ONLY;
        }
        if framing >= Framing::Structured {
            flags |= SEND_DF;
        }
        if framing == Framing::Extended {
            flags |= BLOCK_STATUS_PAYLOAD;
        }
        Self(flags)
    }
}

/// The server's first words.
pub(in crate::nbd) fn greeting() -> [u8; 18] {
    Writer::new()
        .put(NBD_MAGIC.to_be_bytes())
        .put(OPTION_MAGIC.to_be_bytes())
        .put((HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).to_be_bytes())
        .done()
}

/// The client's answer to the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct ClientFlags {
    /// It understands replies to options; without it, only `EXPORT_NAME` makes sense.
    pub(in crate::nbd) fixed_newstyle: bool,
    /// It does not want 124 zero bytes after `EXPORT_NAME`.
    pub(in crate::nbd) no_zeroes: bool,
}

impl ClientFlags {
    /// `None` when a flag is unknown: the connection must be dropped.
    pub(in crate::nbd) fn decode(bytes: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(bytes);
        (flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) == 0).then_some(Self {
            fixed_newstyle: flags & CLIENT_FIXED_NEWSTYLE != 0,
            no_zeroes: flags & CLIENT_NO_ZEROES != 0,
        })
    }
}

/// Number of an option; replies repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct OptionCode(u32);

impl OptionCode {
    pub(in crate::nbd) const EXPORT_NAME: Self = Self(1);
    pub(in crate::nbd) const ABORT: Self = Self(2);
    const LIST: Self = Self(3);
    pub(in crate::nbd) const STARTTLS: Self = Self(5);
    const INFO: Self = Self(6);
    const GO: Self = Self(7);
    const STRUCTURED_REPLY: Self = Self(8);
    const LIST_META_CONTEXT: Self = Self(9);
    pub(in crate::nbd) const SET_META_CONTEXT: Self = Self(10);
    const EXTENDED_HEADERS: Self = Self(11);
}

/// What precedes an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct OptionHeader {
    /// Which option.
    pub(in crate::nbd) code: OptionCode,
    /// Bytes of data that follow.
    pub(in crate::nbd) len: u32,
}

impl OptionHeader {
    /// `None` means a wrong magic: the stream is out of step.
    pub(in crate::nbd) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        (fields.u64()? == OPTION_MAGIC).then_some(())?;
        Some(Self {
            code: OptionCode(fields.u32()?),
            len: fields.u32()?,
        })
    }
}

/// A well-formed option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum ClientOption {
    /// Use this export now; there is no way to say no but hanging up.
    ExportName(String),
    /// Goodbye.
    Abort,
    /// Which exports are there?
    List,
    /// Encrypt from here on.
    StartTls,
    /// Tell me about this export.
    Info(ExportQuery),
    /// The same, and then use it.
    Go(ExportQuery),
    /// Structured replies, please.
    StructuredReply,
    /// Which metadata contexts match?
    ListMetaContext(ContextQuery),
    /// Use those that match, instead of all chosen before.
    SetMetaContext(ContextQuery),
    /// 64-bit requests, please.
    ExtendedHeaders,
    /// Anything else.
    Unknown,
}

/// Data of `INFO` and `GO`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::nbd) struct ExportQuery {
    /// The export.
    pub(in crate::nbd) name: String,
    /// The canonical name is wanted.
    pub(in crate::nbd) wants_name: bool,
    /// The description is wanted.
    pub(in crate::nbd) wants_description: bool,
    /// The block sizes are wanted.
    pub(in crate::nbd) wants_block_size: bool,
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::nbd) struct ContextQuery {
    /// The export.
    pub(in crate::nbd) export: String,
    /// There was no query at all, which asks for everything when listing, and for nothing when setting.
    pub(in crate::nbd) without_queries: bool,
    /// Contexts that queries name.
    pub(in crate::nbd) named: Contexts,
    /// Contexts of namespaces that a query asks for as a whole (`base:`), which counts when listing, and not when setting.
    pub(in crate::nbd) wildcard: Contexts,
}

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

impl ClientOption {
    /// Decodes an option's data.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub(in crate::nbd) fn decode(code: OptionCode, data: &[u8]) -> Result<Self, &'static str> {
        let option = match code {
            OptionCode::EXPORT_NAME => return string(data).map(ClientOption::ExportName),
            OptionCode::INFO => return ExportQuery::decode(data).map(ClientOption::Info),
            OptionCode::GO => return ExportQuery::decode(data).map(ClientOption::Go),
            OptionCode::LIST_META_CONTEXT => {
                return ContextQuery::decode(data).map(ClientOption::ListMetaContext);
            }
            OptionCode::SET_META_CONTEXT => {
                return ContextQuery::decode(data).map(ClientOption::SetMetaContext);
            }
            // A client that leaves may leave its data malformed.
            OptionCode::ABORT => return Ok(ClientOption::Abort),
            OptionCode::LIST => ClientOption::List,
            OptionCode::STARTTLS => ClientOption::StartTls,
            OptionCode::STRUCTURED_REPLY => ClientOption::StructuredReply,
            OptionCode::EXTENDED_HEADERS => ClientOption::ExtendedHeaders,
            _ => return Ok(ClientOption::Unknown),
        };
        if data.is_empty() {
            Ok(option)
        } else {
            Err("this option takes no data")
        }
    }
}

impl ClientOption {
    /// The export that it is about.
    pub(in crate::nbd) fn export(&self) -> Option<&str> {
        match self {
            ClientOption::ExportName(name) => Some(name),
            ClientOption::Info(query) | ClientOption::Go(query) => Some(&query.name),
            ClientOption::ListMetaContext(query) | ClientOption::SetMetaContext(query) => Some(&query.export),
            _ => None,
        }
    }
}

impl ExportQuery {
    fn decode(data: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "the option's data ends early";
        let mut fields = Fields::new(data);
        let mut query = Self {
            name: counted_string(&mut fields)?,
            ..Self::default()
        };
        for _ in 0..fields.u16().ok_or(SHORT)? {
            match fields.u16().ok_or(SHORT)? {
                INFO_NAME => query.wants_name = true,
                INFO_DESCRIPTION => query.wants_description = true,
                INFO_BLOCK_SIZE => query.wants_block_size = true,
                // INFO_EXPORT is always sent; kinds of information that we do not know are ignored, as they should.
                _ => {}
            }
        }
        whole(&fields, query)
    }
}

impl ContextQuery {
    fn decode(data: &[u8]) -> Result<Self, &'static str> {
        let mut fields = Fields::new(data);
        let mut query = Self {
            export: counted_string(&mut fields)?,
            ..Self::default()
        };
        let count = fields.u32().ok_or("the option's data ends early")?;
        query.without_queries = count == 0;
        for _ in 0..count {
            // Others are of other servers, or of the future.
            let asked = counted_string(&mut fields)?;
            for context in Context::ALL {
                if asked == context.name() {
                    query.named = query.named.with(context);
                } else if asked == context.namespace() {
                    query.wildcard = query.wildcard.with(context);
                }
            }
        }
        whole(&fields, query)
    }
}

fn whole<T>(fields: &Fields<'_>, value: T) -> Result<T, &'static str> {
    if fields.is_empty() {
        Ok(value)
    } else {
        Err("the option has more data than it declares")
    }
}

fn counted_string(fields: &mut Fields<'_>) -> Result<String, &'static str> {
    let len = fields.u32().ok_or("the option's data ends early")?;
    string(
        fields
            .take(len as usize)
            .ok_or("a string is longer than the option")?,
    )
}

fn string(bytes: &[u8]) -> Result<String, &'static str> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err("a string is longer than 4096 bytes");
    }
    let text = str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")?;
    if text.contains('\0') {
        return Err("a string contains NUL");
    }
    Ok(text.to_owned())
}

/// Why an option is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::nbd) enum OptionError {
    /// Not known to this server.
    Unsupported = (1 << 31) + 1,
    /// Known, well-formed, and not allowed.
    Policy = (1 << 31) + 2,
    /// Malformed, or out of order.
    Invalid = (1 << 31) + 3,
    /// Nothing before TLS.
    TlsRequired = (1 << 31) + 5,
    /// No such export, or none that this client may know of.
    Unknown = (1 << 31) + 6,
    /// The server is going away.
    Shutdown = (1 << 31) + 7,
    /// More data than this server takes.
    TooBig = (1 << 31) + 9,
    /// Extended headers are in use, and leave no choice.
    ExtendedHeaders = (1 << 31) + 10,
}

/// The replies to one option, gathered for one send.
pub(in crate::nbd) struct OptionReplies {
    code: OptionCode,
    bytes: Vec<u8>,
}

impl OptionReplies {
    /// Nothing yet.
    pub(in crate::nbd) fn to(code: OptionCode) -> Self {
        Self {
            code,
            bytes: Vec::new(),
        }
    }

    fn put(mut self, kind: u32, data: &[&[u8]]) -> Self {
        let len: usize = data.iter().map(|d| d.len()).sum();
        self.bytes.extend(REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.code.0.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((len as u32).to_be_bytes());
        for piece in data {
            self.bytes.extend(*piece);
        }
        self
    }

    /// Done, or yes.
    pub(in crate::nbd) fn ack(self) -> Self {
        self.put(1, &[])
    }

    /// One export of a list.
    pub(in crate::nbd) fn server(self, name: &str, description: &str) -> Self {
        let name = clip(name, STRING_BYTES_MAX);
        let len = (name.len() as u32).to_be_bytes();
        let description = clip(description, STRING_BYTES_MAX);
        self.put(2, &[&len, name.as_bytes(), description.as_bytes()])
    }

    fn info(self, kind: u16, data: &[u8]) -> Self {
        self.put(3, &[&kind.to_be_bytes(), data])
    }

    /// Size in bytes and abilities.
    pub(in crate::nbd) fn info_export(self, size_bytes: u64, flags: ExportFlags) -> Self {
        self.info(INFO_EXPORT, &export_facts(size_bytes, flags))
    }

    /// The canonical name.
    pub(in crate::nbd) fn info_name(self, name: &str) -> Self {
        self.info(INFO_NAME, clip(name, STRING_BYTES_MAX).as_bytes())
    }

    /// Words for people.
    pub(in crate::nbd) fn info_description(self, description: &str) -> Self {
        self.info(INFO_DESCRIPTION, clip(description, STRING_BYTES_MAX).as_bytes())
    }

    /// Least, preferred and largest request in bytes.
    pub(in crate::nbd) fn info_block_size(self, min: u32, preferred: u32, max: u32) -> Self {
        let sizes: [u8; 12] = Writer::new()
            .put(min.to_be_bytes())
            .put(preferred.to_be_bytes())
            .put(max.to_be_bytes())
            .done();
        self.info(INFO_BLOCK_SIZE, &sizes)
    }

    /// One metadata context.
    pub(in crate::nbd) fn meta_context(self, id: u32, name: &str) -> Self {
        self.put(4, &[&id.to_be_bytes(), name.as_bytes()])
    }

    /// No, and why.
    pub(in crate::nbd) fn error(self, error: OptionError, text: &str) -> Self {
        self.put(error as u32, &[clip(text, STRING_BYTES_MAX).as_bytes()])
    }

    /// What to send.
    pub(in crate::nbd) fn into_bytes(self) -> Box<[u8]> {
        self.bytes.into()
    }
}

fn export_facts(size_bytes: u64, flags: ExportFlags) -> [u8; 10] {
    Writer::new()
        .put(size_bytes.to_be_bytes())
        .put(flags.0.to_be_bytes())
        .done()
}

/// The reply to `EXPORT_NAME`, with the historic 124 zeros unless the client declined them.
pub(in crate::nbd) fn export_name_reply(size_bytes: u64, flags: ExportFlags, no_zeroes: bool) -> Box<[u8]> {
    let mut bytes = export_facts(size_bytes, flags).to_vec();
    if !no_zeroes {
        bytes.extend([0; 124]);
    }
    bytes.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counted(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
    }

    proptest! {
        #[test]
        fn any_data_of_any_option_is_decoded_or_refused(
            code in prop_oneof![0u32..13, any::<u32>()],
            data in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let _ = ClientOption::decode(OptionCode(code), &data);
        }

        #[test]
        fn data_with_plausible_lengths_is_decoded_or_refused(
            code in 6u32..11,
            name in "[a-z/]{0,12}",
            count in 0u32..5,
            queries in prop::collection::vec("(base:(allocation)?|qemu:(allocation-depth)?|[a-z:]{0,9})", 0..5),
            cut in 0usize..8,
        ) {
            let mut data = counted(&name);
            data.extend(count.to_be_bytes());
            for query in &queries {
                data.extend(counted(query));
            }
            data.truncate(data.len() - cut.min(data.len()));
            let decoded = ClientOption::decode(OptionCode(code), &data);
            if cut == 0 && code >= 9 && count as usize == queries.len() {
                let Ok(ClientOption::ListMetaContext(query) | ClientOption::SetMetaContext(query)) = decoded else {
                    panic!("well-formed")
                };
                prop_assert_eq!(query.export, name);
                prop_assert_eq!(query.without_queries, queries.is_empty());
                for context in Context::ALL {
                    prop_assert_eq!(query.named.has(context), queries.iter().any(|q| q == context.name()));
                    prop_assert_eq!(query.wildcard.has(context), queries.iter().any(|q| q == context.namespace()));
                }
            }
        }

        #[test]
        fn any_option_header_and_client_flags_are_decoded_or_refused(bytes: [u8; HEADER_BYTES], flags: u32) {
            prop_assert_eq!(OptionHeader::decode(&bytes).is_some(), bytes[..8] == *b"IHAVEOPT");
            prop_assert_eq!(ClientFlags::decode(flags.to_be_bytes()).is_some(), flags < 4);
        }
    }

    #[test]
    fn replies_are_as_drawn_and_follow_each_other() {
        let bytes = OptionReplies::to(OptionCode::LIST)
            .server("a", "b")
            .ack()
            .into_bytes();
        let magic = [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9];
        let server = [
            &magic[..],
            &[0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 6],
            &[0, 0, 0, 1],
            b"ab",
        ]
        .concat();
        let ack = [&magic[..], &[0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0]].concat();
        assert_eq!(bytes[..], [server, ack].concat());
    }
}
