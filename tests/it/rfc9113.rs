//! What RFC 9113 requires of a server when a client violates it, one row each, frame by frame.
//!
//! A row has the section, the client's frames, and the required reaction. If the HTTP/2 library reacts differently,
//! the row states its reaction and why that is acceptable. Each row uses its own clear-text connection; every
//! eighth one is also tried over TLS.

use crate::harness::client::Client;
use crate::harness::frames::code::{
    CANCEL, COMPRESSION_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM,
    STREAM_CLOSED,
};
use crate::harness::frames::{ACK, END_HEADERS, END_STREAM, Frame, Frames, PREFACE, kind};
use crate::harness::gateway::Watched;
use crate::harness::origin::Closed;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{DEADLINE, Gateway, Origin, Setup, ok};

/// The PADDED flag of DATA and HEADERS.
const PADDED: u8 = 0x8;
/// The PRIORITY flag of HEADERS.
const PRIORITY: u8 = 0x20;
/// The flags of a single-frame header block without a body.
const WHOLE: u8 = END_HEADERS | END_STREAM;
/// The default maximum frame size.
const FRAME_BYTES: usize = 16_384;

/// The reaction to a client's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// GOAWAY with this code, and the end of the connection.
    Goaway(u32),
    /// RST_STREAM on this stream with this code; the connection continues.
    Reset(u32, u32),
    /// A response on this stream with this status; the connection continues.
    Status(u32, u16),
    /// No reaction; the connection continues.
    Ignored,
    /// The connection is closed, because it is not HTTP/2.
    Closed,
}

use Then::{Closed as Ends, Goaway, Ignored, Reset, Status};

/// A requirement.
struct Row {
    section: &'static str,
    about: &'static str,
    sent: Vec<u8>,
    /// The reaction that RFC 9113 requires.
    demanded: Then,
    /// The actual reaction, if different, and why that is acceptable.
    instead: Option<(Then, &'static str)>,
}

impl Row {
    /// With a different reaction.
    fn but(mut self, seen: Then, why: &'static str) -> Row {
        self.instead = Some((seen, why));
        self
    }

    fn expected(&self) -> Then {
        self.instead.map_or(self.demanded, |(seen, _)| seen)
    }
}

const STRICTER: &str = "the library makes it an error of the connection, which §5.4 allows";
const NO_COMPRESSION: &str = "the library ends the connection as it must, but knows no COMPRESSION_ERROR";
const OTHER_CODE: &str = "the library ends the connection as it must, with a more general code";

const ANSWERED: &str = "it is answered, as §8.1.1 allows";

/// A row for a client that has sent preface and settings.
fn row(section: &'static str, about: &'static str, frames: &[Frame], demanded: Then) -> Row {
    let opening = [PREFACE.to_vec(), Frame::new(kind::SETTINGS, 0, 0, []).bytes()];
    let sent = opening.into_iter().chain(frames.iter().map(Frame::bytes)).collect::<Vec<_>>().concat();
    Row { section, about, sent, demanded, instead: None }
}

/// A row for a client that sends raw bytes from the start.
fn raw(section: &'static str, about: &'static str, sent: &[&[u8]], demanded: Then) -> Row {
    Row { section, about, sent: sent.concat(), demanded, instead: None }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Frame {
    Frame::new(kind, flags, stream, payload)
}

fn data(flags: u8, stream: u32, payload: &[u8]) -> Frame {
    frame(kind::DATA, flags, stream, payload)
}

fn settings(id: u16, value: u32) -> Frame {
    frame(kind::SETTINGS, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

/// A header block with these fields as literals.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).ok().filter(|&length| length < 127).expect("a short text"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// The header block of a GET with a field whose bytes need not be text.
fn odd_field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut block = block(&GET);
    block.push(0);
    for text in [name, value] {
        block.push(u8::try_from(text.len()).expect("a short text"));
        block.extend_from_slice(text);
    }
    block
}

const GET: [(&str, &str); 4] = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "test")];
const POST: [(&str, &str); 4] = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "test")];

/// A request with these fields on stream 1, without a body.
fn asks(fields: &[(&str, &str)]) -> Frame {
    frame(kind::HEADERS, WHOLE, 1, &block(fields))
}

/// A GET with further fields.
fn get_with(fields: &[(&str, &str)]) -> Frame {
    asks(&[&GET, fields].concat())
}

/// The header of a POST with further fields.
fn post_with(fields: &[(&str, &str)]) -> Frame {
    frame(kind::HEADERS, END_HEADERS, 1, &block(&[&POST, fields].concat()))
}

fn preface_and_frames() -> Vec<Row> {
    let ping = Frame::ping([1; 8]);
    vec![
        raw("3.4", "a preface that is none", &[b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"], Ends),
        raw("3.4", "the first frame is no SETTINGS", &[PREFACE, &ping.bytes()], Goaway(PROTOCOL_ERROR)),
        raw(
            "3.4",
            "the first frame answers settings",
            &[PREFACE, &frame(kind::SETTINGS, ACK, 0, &[]).bytes()],
            Goaway(PROTOCOL_ERROR),
        ),
        raw("3.4", "the first frame is a request", &[PREFACE, &Frame::get(1).bytes()], Goaway(PROTOCOL_ERROR)),
        row("4.1", "a frame of an unknown kind", &[frame(0xbe, 0xff, 0, &[1; 20])], Ignored),
        row("4.1", "the same on a stream", &[Frame::post(1), frame(0xbe, 0, 1, &[1; 20])], Ignored),
        row("4.1", "flags that a PING does not have", &[frame(kind::PING, 0xfe, 0, &[2; 8])], Ignored),
        row("4.1", "flags that SETTINGS do not have", &[frame(kind::SETTINGS, 0xfe, 0, &[])], Ignored),
        row(
            "4.1",
            "flags that HEADERS do not have",
            &[frame(kind::HEADERS, WHOLE | 0xd2, 1, &Frame::get(1).payload)],
            Status(1, 200),
        ),
        row(
            "4.1",
            "flags that DATA does not have",
            &[Frame::post(1), data(END_STREAM | 0xf6, 1, b"a")],
            Status(1, 200),
        ),
        row(
            "4.1",
            "the reserved bit is set",
            &[frame(kind::HEADERS, WHOLE, 1 << 31 | 1, &Frame::get(1).payload)],
            Status(1, 200),
        ),
        row(
            "4.2",
            "DATA of the largest size",
            &[Frame::post(1), data(END_STREAM, 1, &[7; FRAME_BYTES])],
            Status(1, 200),
        ),
        row("4.2", "DATA beyond it", &[Frame::post(1), data(0, 1, &[7; FRAME_BYTES + 1])], Goaway(FRAME_SIZE_ERROR)),
        row(
            "4.2",
            "HEADERS beyond it",
            &[frame(kind::HEADERS, WHOLE, 1, &[0x82; FRAME_BYTES + 1])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row("4.2", "SETTINGS beyond it", &[frame(kind::SETTINGS, 0, 0, &[0; 16_386])], Goaway(FRAME_SIZE_ERROR)),
        row("4.2", "an unknown kind beyond it", &[frame(0xbe, 0, 0, &[0; FRAME_BYTES + 1])], Goaway(FRAME_SIZE_ERROR)),
        row(
            "4.2",
            "HEADERS without room for the priority",
            &[frame(kind::HEADERS, WHOLE | PRIORITY, 1, &[0, 0, 0])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "4.2",
            "HEADERS without room for the padding",
            &[frame(kind::HEADERS, WHOLE | PADDED, 1, &[])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "4.2",
            "DATA without room for the padding",
            &[Frame::post(1), data(PADDED, 1, &[])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row("4.2", "GOAWAY without room for its code", &[frame(kind::GOAWAY, 0, 0, &[0; 7])], Goaway(FRAME_SIZE_ERROR)),
    ]
}

fn field_blocks() -> Vec<Row> {
    let broken = |about, block: &[u8]| {
        row("4.3", about, &[frame(kind::HEADERS, WHOLE, 1, block)], Goaway(COMPRESSION_ERROR))
            .but(Goaway(PROTOCOL_ERROR), NO_COMPRESSION)
    };
    let get = Frame::get(1).payload;
    let begin = |payload: &[u8]| frame(kind::HEADERS, END_STREAM, 1, payload);
    let goes_on = |flags, stream, payload: &[u8]| frame(kind::CONTINUATION, flags, stream, payload);
    vec![
        broken("index 0 of the table", &[0x80]),
        broken("an index beyond the table", &[0xff, 0xff, 0x7f]),
        broken("an integer without an end", &[0xff; 12]),
        broken("a text that is cut short", &[0x82, 0x86, 0x84, 0x41, 40, b't']),
        broken("Huffman codes with the end in them", &[0x82, 0x86, 0x84, 0x41, 0x84, 0xff, 0xff, 0xff, 0xff]),
        broken("Huffman codes with too long a padding", &[0x82, 0x86, 0x84, 0x41, 0x83, 0x1f, 0xff, 0xff]),
        broken("a table larger than allowed", &[&[0x3f, 0xe2, 0x7f][..], &get].concat()),
        broken("a table that changes behind a field", &[&get[..], &[0x20]].concat()),
        row(
            "4.3",
            "a table that changes at the beginning",
            &[frame(kind::HEADERS, WHOLE, 1, &[&[0x20][..], &get].concat())],
            Status(1, 200),
        ),
        row(
            "4.3",
            "a block in three pieces",
            &[begin(&get[..3]), goes_on(0, 1, &get[3..4]), goes_on(END_HEADERS, 1, &get[4..])],
            Status(1, 200),
        ),
        row(
            "4.3",
            "a block that ends with an empty piece",
            &[begin(&get), goes_on(END_HEADERS, 1, &[])],
            Status(1, 200),
        ),
        row("4.3", "a PING inside of a block", &[begin(&get), Frame::ping([1; 8])], Goaway(PROTOCOL_ERROR)),
        row("4.3", "HEADERS inside of a block", &[begin(&get), Frame::get(3)], Goaway(PROTOCOL_ERROR)),
        row("5.5", "an unknown kind inside of a block", &[begin(&get), frame(0xbe, 0, 1, &[])], Goaway(PROTOCOL_ERROR)),
        row("6.10", "DATA inside of a block", &[begin(&get), data(0, 1, b"x")], Goaway(PROTOCOL_ERROR)),
        row(
            "6.10",
            "the block goes on on another stream",
            &[begin(&get[..3]), goes_on(END_HEADERS, 3, &get[3..])],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "6.10",
            "the block goes on on stream 0",
            &[begin(&get[..3]), goes_on(END_HEADERS, 0, &get[3..])],
            Goaway(PROTOCOL_ERROR),
        ),
        row("6.10", "CONTINUATION of nothing", &[goes_on(END_HEADERS, 1, &get)], Goaway(PROTOCOL_ERROR)),
        row(
            "6.10",
            "CONTINUATION of a block that has ended",
            &[Frame::get(1), goes_on(END_HEADERS, 1, &get)],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "6.10",
            "CONTINUATION after DATA",
            &[Frame::post(1), data(0, 1, b"x"), goes_on(END_HEADERS, 1, &get)],
            Goaway(PROTOCOL_ERROR),
        ),
    ]
}

fn stream_states() -> Vec<Row> {
    let window_update = Frame::credit(1, 10);
    let priority = frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 3, 9]);
    let get_in_vain = || {
        Frame::new(
            kind::HEADERS,
            WHOLE,
            1,
            block(&[&GET[..2], &[(":path", "/silent"), (":authority", "test")]].concat()),
        )
    };
    vec![
        row("5.1", "idle: DATA", &[data(0, 1, b"x")], Goaway(PROTOCOL_ERROR)),
        row("5.1", "idle: RST_STREAM", &[Frame::reset(1, CANCEL)], Goaway(PROTOCOL_ERROR)),
        row("5.1", "idle: WINDOW_UPDATE", std::slice::from_ref(&window_update), Goaway(PROTOCOL_ERROR)),
        row("5.1", "idle: PRIORITY", std::slice::from_ref(&priority), Ignored),
        row("5.1", "idle, of the server's number: RST_STREAM", &[Frame::reset(2, CANCEL)], Goaway(PROTOCOL_ERROR)),
        row("5.1", "idle, of the server's number: WINDOW_UPDATE", &[Frame::credit(2, 1)], Goaway(PROTOCOL_ERROR)),
        row("5.1", "idle, of the server's number: DATA", &[data(0, 2, b"x")], Goaway(PROTOCOL_ERROR)),
        row("5.1", "half-closed: DATA", &[get_in_vain(), data(0, 1, b"x")], Reset(1, STREAM_CLOSED))
            .but(Goaway(PROTOCOL_ERROR), STRICTER),
        row("5.1", "half-closed: HEADERS", &[get_in_vain(), Frame::get(1)], Reset(1, STREAM_CLOSED))
            .but(Goaway(PROTOCOL_ERROR), STRICTER),
        row("5.1", "half-closed: WINDOW_UPDATE", &[get_in_vain(), window_update.clone()], Ignored),
        row("5.1", "half-closed: PRIORITY", &[get_in_vain(), priority.clone()], Ignored),
        row("5.1", "half-closed: RST_STREAM", &[get_in_vain(), Frame::reset(1, CANCEL)], Ignored),
        row("5.1", "open: RST_STREAM", &[Frame::post(1), Frame::reset(1, CANCEL)], Ignored),
        row(
            "5.1",
            "closed by the client: DATA",
            &[Frame::post(1), Frame::reset(1, CANCEL), data(0, 1, b"x")],
            Reset(1, STREAM_CLOSED),
        ),
        row(
            "5.1",
            "closed by the client: HEADERS",
            &[Frame::post(1), Frame::reset(1, CANCEL), Frame::get(1)],
            Reset(1, STREAM_CLOSED),
        )
        .but(Goaway(PROTOCOL_ERROR), STRICTER),
        row(
            "5.1",
            "closed by the client: WINDOW_UPDATE",
            &[Frame::post(1), Frame::reset(1, CANCEL), window_update],
            Ignored,
        ),
        row(
            "5.1",
            "closed by the client: RST_STREAM",
            &[Frame::post(1), Frame::reset(1, CANCEL), Frame::reset(1, CANCEL)],
            Ignored,
        ),
        row("5.1", "closed by the client: PRIORITY", &[Frame::post(1), Frame::reset(1, CANCEL), priority], Ignored),
        row(
            "5.1.1",
            "a stream of the server's number",
            &[frame(kind::HEADERS, WHOLE, 2, &Frame::get(1).payload)],
            Goaway(PROTOCOL_ERROR),
        ),
        row("5.1.1", "a lower number than before", &[Frame::get(5), Frame::get(3)], Goaway(PROTOCOL_ERROR)),
        row(
            "5.1.1",
            "the same number again",
            &[Frame::post(5), Frame::reset(5, CANCEL), Frame::post(5)],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "5.1.1",
            "DATA on a number that was passed over",
            &[Frame::get(5), data(0, 3, b"x")],
            Reset(3, STREAM_CLOSED),
        ),
        row(
            "5.1.2",
            "more streams than allowed",
            &[Frame::post(1), Frame::post(3), Frame::post(5)],
            Reset(5, REFUSED_STREAM),
        ),
        row("5.4.2", "a reset is not answered with one", &[Frame::post(1), Frame::reset(1, 0xfffe)], Ignored),
        row("5.5", "an unknown setting", &[settings(0xbeef, 7)], Ignored),
        row(
            "5.5",
            "an unknown code of an error",
            &[frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0xff, 0xff])],
            Ignored,
        )
        .but(Goaway(NO_ERROR), "the client says goodbye, and so does the gateway"),
    ]
}

fn frames() -> Vec<Row> {
    let padded = |length: u8, rest: &[u8]| [&[length][..], rest].concat();
    let get = Frame::get(1).payload;
    let too_large = (1_u32 << 31).to_be_bytes();
    vec![
        row("6.1", "DATA on stream 0", &[data(0, 0, b"x")], Goaway(PROTOCOL_ERROR)),
        row(
            "6.1",
            "DATA with padding",
            &[Frame::post(1), data(PADDED | END_STREAM, 1, &padded(4, b"body\0\0\0\0"))],
            Status(1, 200),
        ),
        row(
            "6.1",
            "DATA of nothing but padding",
            &[Frame::post(1), data(PADDED | END_STREAM, 1, &padded(4, b"\0\0\0\0"))],
            Status(1, 200),
        ),
        row(
            "6.1",
            "DATA with padding beyond its end",
            &[Frame::post(1), data(PADDED, 1, &padded(5, b"body"))],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "6.1",
            "DATA with padding as long as the frame",
            &[Frame::post(1), data(PADDED, 1, &padded(5, b""))],
            Goaway(PROTOCOL_ERROR),
        ),
        row("6.2", "HEADERS on stream 0", &[frame(kind::HEADERS, WHOLE, 0, &get)], Goaway(PROTOCOL_ERROR)),
        row(
            "6.2",
            "HEADERS with padding",
            &[frame(kind::HEADERS, WHOLE | PADDED, 1, &[&padded(3, &get)[..], &[0; 3]].concat())],
            Status(1, 200),
        ),
        row(
            "6.2",
            "HEADERS with padding beyond its end",
            &[frame(kind::HEADERS, WHOLE | PADDED, 1, &padded(200, &get))],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "6.2",
            "HEADERS with a priority",
            &[frame(kind::HEADERS, WHOLE | PRIORITY, 1, &[&[0, 0, 0, 3, 9][..], &get].concat())],
            Status(1, 200),
        ),
        row("6.3", "PRIORITY on stream 0", &[frame(kind::PRIORITY, 0, 0, &[0, 0, 0, 3, 9])], Goaway(PROTOCOL_ERROR)),
        row(
            "6.3",
            "PRIORITY of four bytes",
            &[Frame::post(1), frame(kind::PRIORITY, 0, 1, &[0; 4])],
            Reset(1, FRAME_SIZE_ERROR),
        )
        .but(Goaway(FRAME_SIZE_ERROR), STRICTER),
        row(
            "6.3",
            "PRIORITY of six bytes",
            &[Frame::post(1), frame(kind::PRIORITY, 0, 1, &[0; 6])],
            Reset(1, FRAME_SIZE_ERROR),
        )
        .but(Goaway(FRAME_SIZE_ERROR), STRICTER),
        row("6.4", "RST_STREAM on stream 0", &[Frame::reset(0, CANCEL)], Goaway(PROTOCOL_ERROR)),
        row(
            "6.4",
            "RST_STREAM of three bytes",
            &[Frame::post(1), frame(kind::RST_STREAM, 0, 1, &[0; 3])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "6.4",
            "RST_STREAM of five bytes",
            &[Frame::post(1), frame(kind::RST_STREAM, 0, 1, &[0; 5])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "6.5",
            "an answer to settings with a payload",
            &[frame(kind::SETTINGS, ACK, 0, &[0; 6])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row("6.5", "SETTINGS on a stream", &[frame(kind::SETTINGS, 0, 1, &[])], Goaway(PROTOCOL_ERROR)),
        row("6.5", "SETTINGS of five bytes", &[frame(kind::SETTINGS, 0, 0, &[0; 5])], Goaway(FRAME_SIZE_ERROR)),
        row("6.5.2", "SETTINGS_ENABLE_PUSH of 2", &[settings(2, 2)], Goaway(PROTOCOL_ERROR)),
        row("6.5.2", "SETTINGS_ENABLE_PUSH of 0", &[settings(2, 0)], Ignored),
        row("6.5.2", "SETTINGS_INITIAL_WINDOW_SIZE of 2^31", &[settings(4, 1 << 31)], Goaway(FLOW_CONTROL_ERROR))
            .but(Goaway(PROTOCOL_ERROR), OTHER_CODE),
        row("6.5.2", "SETTINGS_MAX_FRAME_SIZE of 16,383", &[settings(5, 16_383)], Goaway(PROTOCOL_ERROR)),
        row("6.5.2", "SETTINGS_MAX_FRAME_SIZE of 2^24", &[settings(5, 1 << 24)], Goaway(PROTOCOL_ERROR)),
        row("6.5.2", "SETTINGS_MAX_FRAME_SIZE of 2^24 - 1", &[settings(5, (1 << 24) - 1)], Ignored),
        row("6.5.2", "SETTINGS_MAX_CONCURRENT_STREAMS of 0", &[settings(3, 0)], Ignored),
        row("6.5.2", "SETTINGS_HEADER_TABLE_SIZE of 2^32 - 1", &[settings(1, u32::MAX)], Ignored),
        row("6.5.2", "SETTINGS_HEADER_TABLE_SIZE of 0", &[settings(1, 0)], Ignored),
        row(
            "6.6",
            "PUSH_PROMISE",
            &[Frame::post(1), frame(kind::PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &get].concat())],
            Goaway(PROTOCOL_ERROR),
        ),
        row("6.7", "PING on a stream", &[frame(kind::PING, 0, 1, &[0; 8])], Goaway(PROTOCOL_ERROR)),
        row("6.7", "PING of seven bytes", &[frame(kind::PING, 0, 0, &[0; 7])], Goaway(FRAME_SIZE_ERROR)),
        row("6.7", "PING of nine bytes", &[frame(kind::PING, 0, 0, &[0; 9])], Goaway(FRAME_SIZE_ERROR)),
        row("6.7", "an answer to a ping that was not sent", &[frame(kind::PING, ACK, 0, &[9; 8])], Ignored),
        row("6.8", "GOAWAY on a stream", &[frame(kind::GOAWAY, 0, 1, &[0; 8])], Goaway(PROTOCOL_ERROR)),
        row(
            "6.9",
            "WINDOW_UPDATE of nothing on a stream",
            &[Frame::post(1), Frame::credit(1, 0)],
            Reset(1, PROTOCOL_ERROR),
        )
        .but(Goaway(PROTOCOL_ERROR), STRICTER),
        row("6.9", "WINDOW_UPDATE of nothing on the connection", &[Frame::credit(0, 0)], Goaway(PROTOCOL_ERROR)),
        row(
            "6.9",
            "WINDOW_UPDATE of three bytes",
            &[Frame::post(1), frame(kind::WINDOW_UPDATE, 0, 1, &[1; 3])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "6.9",
            "WINDOW_UPDATE of five bytes",
            &[frame(kind::WINDOW_UPDATE, 0, 0, &[1; 5])],
            Goaway(FRAME_SIZE_ERROR),
        ),
        row(
            "6.9",
            "WINDOW_UPDATE with the reserved bit",
            &[frame(kind::WINDOW_UPDATE, 0, 0, &[0x80, 0, 0, 1])],
            Ignored,
        ),
        row(
            "6.9",
            "WINDOW_UPDATE of the reserved bit alone",
            &[frame(kind::WINDOW_UPDATE, 0, 0, &too_large)],
            Goaway(PROTOCOL_ERROR),
        ),
        row(
            "6.9.1",
            "the window of a stream overflows",
            &[Frame::post(1), Frame::credit(1, (1 << 31) - 1)],
            Reset(1, FLOW_CONTROL_ERROR),
        ),
        row(
            "6.9.1",
            "the window of the connection overflows",
            &[Frame::credit(0, (1 << 31) - 1)],
            Goaway(FLOW_CONTROL_ERROR),
        ),
        row(
            "6.9.2",
            "settings make a window overflow",
            &[Frame::post(1), Frame::credit(1, 1 << 30), settings(4, (1 << 31) - 1)],
            Goaway(FLOW_CONTROL_ERROR),
        ),
    ]
}

fn messages() -> Vec<Row> {
    let malformed = |section, about, frames: &[Frame]| row(section, about, frames, Reset(1, PROTOCOL_ERROR));
    let trailers = |flags, fields: &[(&str, &str)]| frame(kind::HEADERS, flags, 1, &block(fields));
    let field = |name: &[u8], value: &[u8]| frame(kind::HEADERS, WHOLE, 1, &odd_field(name, value));
    let of = |name: &'static str, value: &'static str| {
        let mut fields = GET.to_vec();
        fields.retain(|(there, _)| *there != name);
        fields.push((name, value));
        asks(&fields)
    };
    let without = |name: &str| asks(&GET.into_iter().filter(|(there, _)| *there != name).collect::<Vec<_>>());
    vec![
        row(
            "8.1",
            "a body and trailers",
            &[Frame::post(1), data(0, 1, b"x"), trailers(WHOLE, &[("t", "1")])],
            Status(1, 200),
        ),
        malformed(
            "8.1",
            "trailers that do not end the stream",
            &[Frame::post(1), data(0, 1, b"x"), trailers(END_HEADERS, &[("t", "1")])],
        ),
        malformed(
            "8.1",
            "trailers with a pseudo-header",
            &[Frame::post(1), data(0, 1, b"x"), trailers(WHOLE, &[(":path", "/")])],
        )
        .but(Status(1, 200), "the library drops it, so that it reaches nobody"),
        malformed("8.1.1", "a length without a body", &[get_with(&[("content-length", "1")])]),
        malformed(
            "8.1.1",
            "a body that is shorter than its length",
            &[post_with(&[("content-length", "5")]), data(END_STREAM, 1, b"abc")],
        ),
        malformed(
            "8.1.1",
            "a body that is longer than its length",
            &[post_with(&[("content-length", "2")]), data(0, 1, b"abc")],
        ),
        malformed(
            "8.1.1",
            "a body that is longer in two pieces",
            &[post_with(&[("content-length", "2")]), data(0, 1, b"ab"), data(END_STREAM, 1, b"c")],
        ),
        malformed(
            "8.1.1",
            "a body that trailers cut short",
            &[post_with(&[("content-length", "5")]), data(0, 1, b"abc"), trailers(WHOLE, &[("t", "1")])],
        ),
        malformed("8.1.1", "a length that is not a number", &[get_with(&[("content-length", "0x0")])]),
        malformed(
            "8.1.1",
            "two lengths that differ",
            &[post_with(&[("content-length", "1"), ("content-length", "2")])],
        ),
        row(
            "8.1.1",
            "a length that is kept to",
            &[post_with(&[("content-length", "3")]), data(END_STREAM, 1, b"abc")],
            Status(1, 200),
        ),
        malformed("8.2", "an upper-case name", &[get_with(&[("X-Upper", "1")])]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "an empty name", &[field(b"", b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a name with a space", &[field(b"a b", b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a name with NUL", &[field(b"a\0", b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a name with DEL", &[field(b"a\x7f", b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a name beyond ASCII", &[field("ä".as_bytes(), b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a name with a colon", &[field(b"a:b", b"1")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a value with NUL", &[field(b"a", b"1\x002")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a value with LF", &[field(b"a", b"1\n2")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a value with CR", &[field(b"a", b"1\r2")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.2.1", "a value that begins with a space", &[field(b"a", b" 1")]).but(Status(1, 400), ANSWERED),
        malformed("8.2.1", "a value that ends with a tab", &[field(b"a", b"1\t")]).but(Status(1, 400), ANSWERED),
        malformed("8.2.2", "Connection", &[get_with(&[("connection", "close")])]),
        malformed("8.2.2", "Proxy-Connection", &[get_with(&[("proxy-connection", "close")])]),
        malformed("8.2.2", "Keep-Alive", &[get_with(&[("keep-alive", "timeout=5")])]),
        malformed("8.2.2", "Transfer-Encoding", &[get_with(&[("transfer-encoding", "chunked")])]),
        malformed("8.2.2", "Upgrade", &[get_with(&[("upgrade", "websocket")])]),
        malformed("8.2.2", "TE other than trailers", &[get_with(&[("te", "gzip")])]),
        row("8.2.2", "TE: trailers", &[get_with(&[("te", "trailers")])], Status(1, 200)),
        malformed("8.3", "an unknown pseudo-header", &[get_with(&[(":unknown", "1")])])
            .but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.3", "a pseudo-header of answers", &[get_with(&[(":status", "200")])]),
        malformed("8.3", "a pseudo-header behind a field", &[asks(&[GET[0], GET[1], GET[3], ("a", "1"), GET[2]])]),
        malformed("8.3", ":method twice", &[get_with(&[GET[0]])]),
        malformed("8.3", ":scheme twice", &[get_with(&[GET[1]])]),
        malformed("8.3", ":path twice", &[get_with(&[GET[2]])]),
        malformed("8.3", ":authority twice", &[get_with(&[GET[3]])]),
        malformed("8.3.1", "no :method", &[without(":method")]),
        malformed("8.3.1", "no :scheme", &[without(":scheme")]),
        malformed("8.3.1", "no :path", &[without(":path")]),
        row(
            "8.3.1",
            "no :path, and Host instead of :authority",
            &[asks(&[GET[0], GET[1], ("host", "test")])],
            Status(1, 400),
        ),
        malformed("8.3.1", "an empty :path", &[of(":path", "")]),
        malformed("8.3.1", "a :path that is none", &[of(":path", "a b")]),
        malformed("8.3.1", "a :path without a slash", &[of(":path", "a")]),
        row("8.3.1", "a :path of * with GET", &[of(":path", "*")], Status(1, 400)),
        malformed("8.3.1", "an empty :method", &[of(":method", "")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.3.1", "a :method that is no token", &[of(":method", "G T")]).but(Goaway(PROTOCOL_ERROR), STRICTER),
        malformed("8.3.1", "a :scheme that is none", &[of(":scheme", "h ttp")]),
        malformed("8.3.1", "an :authority that is none", &[of(":authority", "a b")]),
        row("8.3.1", "an :authority with a user", &[of(":authority", "user@test")], Status(1, 400)),
        row("8.3.1", "neither :authority nor Host", &[without(":authority")], Status(1, 400)),
        row(
            "8.3.1",
            "Host instead of :authority",
            &[asks(&[GET[0], GET[1], GET[2], ("host", "test")])],
            Status(1, 200),
        ),
        row("8.3.1", "a Host that is not the :authority", &[get_with(&[("host", "other")])], Status(1, 400)),
        row(
            "8.5, RFC 8441",
            "an extended CONNECT for a protocol that is not known",
            &[asks(&[(":method", "CONNECT"), (":protocol", "connect-ip"), GET[1], GET[2], GET[3]])],
            Status(1, 501),
        ),
        malformed(
            "8.5",
            "CONNECT with :path",
            &[asks(&[(":method", "CONNECT"), (":authority", "test:1"), (":path", "/")])],
        ),
        malformed(
            "8.5",
            "CONNECT with :scheme",
            &[asks(&[(":method", "CONNECT"), (":authority", "test:1"), (":scheme", "http")])],
        ),
        malformed("8.5", "CONNECT without :authority", &[asks(&[(":method", "CONNECT")])])
            .but(Status(1, 405), ANSWERED),
    ]
}

fn rows() -> Vec<Row> {
    [preface_and_frames(), field_blocks(), stream_states(), frames(), messages()].into_iter().flatten().collect()
}

/// The reaction to a row, on a new connection.
fn follows(row: &Row, client: &mut Frames) -> Then {
    const MARK: [u8; 8] = *b"and then";
    const LAST: u32 = 101;
    client.send_bytes(&row.sent);
    client.try_send_all(&[Frame::ping(MARK)]);
    let mut is_first = true;
    while let Some(frame) = client.next() {
        if std::mem::take(&mut is_first) {
            assert_eq!((frame.kind, frame.flags), (kind::SETTINGS, 0), "§3.4: a server begins with its settings");
        }
        match frame.kind {
            kind::GOAWAY => {
                let code = frame.code();
                while client.next().is_some() {}
                return Goaway(code);
            }
            kind::RST_STREAM => {
                // The connection continues if a ping is answered.
                client.send(&Frame::ping(*b"goes on!"));
                while client.until(kind::PING).payload != b"goes on!" {}
                return Reset(frame.stream, frame.code());
            }
            kind::HEADERS if frame.stream == LAST => return Ignored,
            kind::HEADERS => return Status(frame.stream, frame.status().expect("a well-known status")),
            kind::PING if frame.payload == MARK && row.expected() == Ignored => client.send(&Frame::get(LAST)),
            _ => {}
        }
    }
    Ends
}

/// Runs rows and returns those with a different reaction.
fn differing(rows: &[Row], connect: impl Fn() -> Frames) -> Vec<String> {
    let differs = |row: &Row| {
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| follows(row, &mut connect())));
        let seen = match tried {
            Ok(seen) if seen == row.expected() => return None,
            Ok(seen) => format!("{seen:?}"),
            Err(_) => "nothing came, or something else".to_owned(),
        };
        Some(format!("§{} {}: expected {:?}, seen {seen}", row.section, row.about, row.expected()))
    };
    rows.iter().filter_map(differs).collect()
}

/// A gateway that responds to everything except `/silent`, whose backend never responds.
fn answering(origin: &Origin, silent: &Closed) -> Setup {
    Setup::before(origin)
        .also_at("silent", silent.address())
        .routes("{ name: silent, match: { path: { exact: /silent } }, upstream: silent }, { name: all, upstream: app }")
        .listener("limits: { streams: 2 }")
}

fn plain(address: std::net::SocketAddr) -> Frames {
    let socket = Client::connect(address).into_wire().into_socket();
    socket.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
    Frames::silent(socket)
}

#[test]
fn every_demand_on_a_server_is_met_or_the_table_says_what_is_done_instead() {
    let (origin, silent) = (Origin::answering(|_| ok("")), Closed::silent());
    let gateway = answering(&origin, &silent).listener("protocols: [h2c]").start();
    let rows = rows();
    let differing = differing(&rows, || plain(gateway.web()));
    assert!(differing.is_empty(), "{} of {} rows:\n{}", differing.len(), rows.len(), differing.join("\n"));
    println!(
        "{} rows, of which {} say what is done instead",
        rows.len(),
        rows.iter().filter(|row| row.instead.is_some()).count()
    );
    gateway.wait_metric("forebay_client_connections", |open| open == 0.0);
    gateway.wait_at_rest();
}

#[test]
fn over_tls_the_same_follows() {
    let (origin, silent) = (Origin::answering(|_| ok("")), Closed::silent());
    let authority = Authority::new();
    let identity = authority.issue(&["test"]);
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&identity));
    let gateway = answering(&origin, &silent).listener(&tls).start();
    let some: Vec<Row> = rows().into_iter().filter(|row| row.expected() != Ends).step_by(8).collect();
    let connect = || Frames::silent(Tls::to(gateway.web(), &authority, "test").alpn(b"\x02h2").connect().expect("TLS"));
    let differing = differing(&some, connect);
    assert!(differing.is_empty(), "{} of {} rows:\n{}", differing.len(), some.len(), differing.join("\n"));
}

/// A gateway for HTTP/2 in front of an origin with this response body.
fn saying(body: &'static str) -> (Origin, Gateway) {
    let origin = Origin::answering(move |_| ok(body));
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    (origin, gateway)
}

/// Reads exactly this many bytes of DATA on a stream, and checks that nothing follows.
fn exactly(client: &mut Frames, stream: u32, count: usize) -> Vec<u8> {
    let mut body = Vec::new();
    while body.len() < count {
        let frame = client.until(kind::DATA);
        assert_eq!(frame.stream, stream);
        body.extend_from_slice(&frame.payload);
    }
    client.send(&Frame::ping([5; 8]));
    let after = client.next().expect("an answer to the ping");
    assert_eq!((after.kind, after.flags), (kind::PING, ACK), "more than there is credit for");
    body
}

#[test]
fn no_more_is_sent_than_there_is_credit_for() {
    // §6.9, §6.9.1
    let (_origin, gateway) = saying("0123456789");
    let mut client = Frames::connect(gateway.web());
    client.send(&settings(4, 0));
    client.send(&Frame::get(1));
    assert_eq!(client.until(kind::HEADERS).status(), Some(200));
    assert_eq!(exactly(&mut client, 1, 0), b"");
    client.send(&Frame::credit(1, 4));
    assert_eq!(exactly(&mut client, 1, 4), b"0123");
    client.send(&settings(4, 3));
    client.until(kind::SETTINGS);
    assert_eq!(exactly(&mut client, 1, 3), b"456", "§6.9.2: a new first window adds to those there are");
}

#[test]
fn a_window_below_zero_has_to_be_paid_back_first() {
    // §6.9.2
    let (_origin, gateway) = saying("0123456789");
    let mut client = Frames::connect(gateway.web());
    client.send(&settings(4, 6));
    client.send(&Frame::get(1));
    assert_eq!(exactly(&mut client, 1, 6), b"012345");
    client.send(&settings(4, 1));
    client.until(kind::SETTINGS);
    client.send(&Frame::credit(1, 5));
    assert_eq!(exactly(&mut client, 1, 0), b"", "it is at 0 now");
    client.send(&Frame::credit(1, 2));
    assert_eq!(exactly(&mut client, 1, 2), b"67");
}

#[test]
fn settings_take_effect_in_their_order_and_are_answered() {
    // §6.5.3
    let (_origin, gateway) = saying("0123456789");
    let mut client = Frames::connect(gateway.web());
    let both = [settings(4, 0).payload, settings(4, 4).payload].concat();
    client.send(&frame(kind::SETTINGS, 0, 0, &both));
    client.send(&Frame::get(1));
    assert_eq!(exactly(&mut client, 1, 4), b"0123", "the last value counts");
}

#[test]
fn a_client_that_says_goodbye_gets_the_answers_that_it_has_asked_for() {
    // §6.8
    let origin = Origin::scripted();
    let gateway = Setup::before(&origin).listener("protocols: [h2c]").start();
    let mut client = Frames::connect(gateway.web());
    client.send(&Frame::get(1));
    let mut backend = origin.accept();
    backend.request();
    client.send(&frame(kind::GOAWAY, 0, 0, &[0; 8]));
    client.send(&Frame::ping([5; 8]));
    while client.until(kind::PING).flags != ACK {}
    backend.answer("after the goodbye");
    assert_eq!(client.answer(1, usize::MAX), ("after the goodbye".len(), true));
    assert_eq!(client.goodbye(), NO_ERROR);
}

#[test]
fn a_client_that_sends_more_than_it_has_credit_for_loses_its_request() {
    // §6.9.1: the body is not needed because the backend cannot be reached.
    let silent = Closed::silent();
    let gateway = Setup::before_all(&[silent.address()])
        .listener("protocols: [h2c]")
        .route("buffering: { request: { mode: stream } }")
        .start();
    let mut client = Frames::connect(gateway.web());
    client.send(&Frame::post(1));
    let pieces = vec![data(0, 1, &[7; FRAME_BYTES]); 5];
    client.try_send_all(&pieces);
    loop {
        let frame = client.next().expect("an error of flow control");
        if matches!(frame.kind, kind::RST_STREAM | kind::GOAWAY) {
            assert_eq!(frame.code(), FLOW_CONTROL_ERROR);
            return;
        }
    }
}

#[test]
fn padding_is_no_part_of_a_body_and_pieces_of_a_cookie_are_one_for_http_1() {
    // §6.1, §8.2.3
    let (origin, gateway) = saying("");
    let mut client = Frames::connect(gateway.web());
    let mut fields = POST.to_vec();
    fields.extend([("cookie", "a=1"), ("x", "y"), ("cookie", "b=2")]);
    client.send(&frame(kind::HEADERS, END_HEADERS, 1, &block(&fields)));
    client.send(&data(PADDED, 1, b"\x03bo\0\0\0"));
    client.send(&data(PADDED | END_STREAM, 1, b"\0dy"));
    assert_eq!(client.until(kind::HEADERS).status(), Some(200));
    let request = origin.request();
    assert_eq!(request.body, b"body");
    assert_eq!(request.values("cookie"), ["a=1; b=2"]);
}
