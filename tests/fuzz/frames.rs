//! HTTP/2 as nobody should speak it: frames of every kind in any order, whole and cut, against a running gateway.
//!
//! A connection in the wrong may be ended. The gateway goes on: others are served, and nothing of it is left.

use std::convert::Infallible;
use std::time::Instant;

use forebay::client::frames::Frames;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::mutate;
use crate::harness::gateway::{Process, Watched};
use crate::harness::origin::built_in;
use crate::harness::{Client, H2Client, Setup, ms};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const WORDS: &[&str] = &[
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "\0\0\0\u{4}\0\0\0\0\0",
    "\0\0\u{8}\u{6}\0\0\0\0\0",
    "\0\0\u{4}\u{8}\0\0\0\0\u{1}",
];

#[test]
fn the_end_of_a_frame_is_where_its_length_says_however_the_bytes_arrive() {
    mutate::explore("frames", WORDS, |bytes: &[u8]| {
        let seen = |size: usize| {
            let (mut frames, mut passed) = (Frames::of_client(), Vec::new());
            for piece in bytes.chunks(size) {
                let shown = frames.take(piece, |what| {
                    passed.push(what);
                    Ok::<_, Infallible>(())
                });
                shown.expect("what cannot fail");
            }
            (passed, frames.unfinished())
        };
        let whole = seen(bytes.len().max(1));
        for size in [1, 2, 9, 100] {
            assert_eq!(seen(size), whole, "in pieces of {size}");
        }
    });
}

#[test]
fn whatever_frames_come_the_gateway_goes_on() {
    let origin = built_in();
    let setup = Setup::before_all(&[origin.address()]).listener("protocols: [http1, h2c], timeouts: { header: 2s }");
    let process = setup.route("client: { body_idle: 2s, write_idle: 2s }").spawn();
    let seed = mutate::seed();
    println!("FOREBAY_FUZZ_SEED={seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let began = Instant::now();
    let mut connections = 0;
    while began.elapsed() < mutate::budget() {
        for _ in 0..20 {
            speak(&process, &mut dice);
            connections += 1;
        }
        serves(&process);
    }
    println!("{connections} connections");
    process.wait_at_rest();
    process.wait_metric("forebay_client_connections", |open| open == 0.0);
    assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
    // What strangers do wrong is counted, and does not fill the log of the process.
    assert!(!process.stderr().contains("h2::"), "{}", process.stderr());
    assert_eq!(process.metric("forebay_refusals_total{reason=\"internal\"}"), 0.0);
}

fn serves(process: &Process) {
    assert_eq!(process.client().get("/bytes/10").body.len(), 10);
    assert_eq!(H2Client::connect(process.web()).get("/bytes/10").body.len(), 10);
}

/// Speaks to the gateway on a connection of its own, and goes away in one way or another.
fn speak(process: &Process, dice: &mut StdRng) {
    let mut client = Client::connect(process.web());
    let bytes = connection(dice);
    for piece in bytes.chunks(dice.gen_range(1..=bytes.len().max(1))) {
        if !client.try_send(piece) {
            break;
        }
    }
    match dice.gen_range(0..4) {
        0 => client.reset(),
        1 => drop(client),
        2 => client.dawdle(ms(dice.gen_range(0..20))),
        _ => {
            client.try_end();
            client.rest();
        }
    }
}

/// All that a client sends on a connection.
pub fn connection(dice: &mut StdRng) -> Vec<u8> {
    let whole = dice.gen_bool(0.97);
    let mut bytes = PREFACE[..if whole { PREFACE.len() } else { dice.gen_range(1..PREFACE.len()) }].to_vec();
    if dice.gen_bool(0.9) {
        bytes.extend(frame(SETTINGS, 0, 0, &settings(dice)));
    }
    let mut next = 1;
    for _ in 0..dice.gen_range(0..40) {
        bytes.extend(any(dice, &mut next));
    }
    if dice.gen_bool(0.1) {
        bytes.truncate(dice.gen_range(0..=bytes.len()));
    }
    if dice.gen_bool(0.1) {
        let at = dice.gen_range(0..bytes.len().max(1));
        bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << dice.gen_range(0..8));
    }
    bytes
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A frame, most often one that could be right where it is.
fn any(dice: &mut StdRng, next: &mut u32) -> Vec<u8> {
    let open = dice.gen_range(0..=*next);
    let mut word = || dice.r#gen::<u32>().to_be_bytes();
    let (a, b) = (word(), word());
    match dice.gen_range(0..16) {
        0..=4 => {
            let stream = if dice.gen_bool(0.9) { *next } else { open };
            *next += 2;
            let block = fields(dice);
            let flags = END_HEADERS | if dice.gen_bool(0.5) { END_STREAM } else { 0 };
            match dice.gen_range(0..6) {
                // In pieces, the last of which may never come.
                0 => {
                    let (first, rest) = block.split_at(dice.gen_range(0..=block.len()));
                    let end = if dice.gen_bool(0.8) { END_HEADERS } else { 0 };
                    [frame(HEADERS, flags & END_STREAM, stream, first), frame(CONTINUATION, end, stream, rest)].concat()
                }
                // With padding and a priority, which may be longer than all of it.
                1 => frame(
                    HEADERS,
                    flags | 0x28,
                    stream,
                    &[&[dice.r#gen::<u8>() % 20][..], &a, &[16], &block, &[0; 8]].concat(),
                ),
                _ => frame(HEADERS, flags, stream, &block),
            }
        }
        5..=7 => {
            let length = [0, 1, 100, 16_384, 16_385][dice.gen_range(0..5)];
            frame(DATA, dice.gen_range(0..=9), open, &vec![b'x'; length])
        }
        8 => frame(RST_STREAM, 0, open, &a),
        9 => frame(SETTINGS, dice.gen_range(0..2), if dice.gen_bool(0.9) { 0 } else { open }, &settings(dice)),
        10 => frame(PING, dice.gen_range(0..2), 0, &[a, b].concat()[..dice.gen_range(0..2) * 4 + 4]),
        11 => frame(GOAWAY, 0, 0, &[a, b].concat()),
        12 => {
            let credit = [0, 1, 65_535, 0x7fff_ffff, 0xffff_ffff_u32][dice.gen_range(0..5)];
            frame(WINDOW_UPDATE, 0, open, &credit.to_be_bytes())
        }
        13 => frame(PRIORITY, 0, open, &[&a[..], &[3]].concat()),
        14 => frame(CONTINUATION, END_HEADERS, open, &fields(dice)),
        // Of any kind, with any flags, of any length up to what is announced to be too long.
        _ => {
            let payload = vec![dice.r#gen(); [0, 5, 8, 300, 70_000][dice.gen_range(0..5)]];
            frame(dice.r#gen(), dice.r#gen(), dice.r#gen::<u32>() >> dice.gen_range(0..32), &payload)
        }
    }
}

fn settings(dice: &mut StdRng) -> Vec<u8> {
    let mut payload = Vec::new();
    for _ in 0..dice.gen_range(0..4) {
        payload.extend(dice.gen_range(0_u16..10).to_be_bytes());
        let value = [0, 1, 100, 16_384, 65_535, 0x7fff_ffff, 0x8000_0000, u32::MAX].choose(dice).copied();
        payload.extend(value.unwrap_or_default().to_be_bytes());
    }
    if dice.gen_bool(0.05) {
        payload.push(0);
    }
    payload
}

/// The header block of a request.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    let pseudo = [(":method", method), (":scheme", "http"), (":authority", "test"), (":path", path)];
    pseudo.iter().flat_map(|(name, value)| field(name, value)).collect()
}

/// A field: literal, not indexed, with a new name, without Huffman's code (RFC 7541 §6.2.2).
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        bytes.push(u8::try_from(text.len()).ok().filter(|length| *length < 0x7f).expect("a short text"));
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// A header block: that of a request, or something like one.
fn fields(dice: &mut StdRng) -> Vec<u8> {
    const PATHS: &[&str] =
        &["/", "/bytes/100", "/bytes/1MiB", "/echo", "/headers", "/fault/reset", "*", "", "/a b", "/\u{e9}"];
    const ODD: &[(&str, &str)] = &[
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("te", "trailers"),
        ("te", "gzip"),
        ("content-length", "5"),
        ("content-length", "x"),
        ("host", "other"),
        ("Upper", "case"),
        ("", "no name"),
        ("a b", "c"),
        ("x", "\r\ny: z"),
        ("x", "\0"),
        (":path", "/late"),
        (":status", "200"),
        (":unknown", "1"),
        ("expect", "100-continue"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "1n"),
        ("upgrade", "h2c"),
        ("cookie", "a=1"),
        ("cookie", "b=2"),
        ("trailer", "x"),
    ];
    let mut block = Vec::new();
    let method = ["GET", "POST", "PUT", "HEAD", "CONNECT", "get", ""][dice.gen_range(0..7)];
    let mut pseudo = vec![
        (":method", method),
        (":scheme", "http"),
        (":authority", "test"),
        (":path", PATHS[dice.gen_range(0..PATHS.len())]),
    ];
    if dice.gen_bool(0.1) {
        pseudo.remove(dice.gen_range(0..4));
    }
    if dice.gen_bool(0.1) {
        pseudo.shuffle(dice);
    }
    for (name, value) in pseudo {
        block.extend(field(name, value));
    }
    for _ in 0..dice.gen_range(0..3) {
        let (name, value) = ODD[dice.gen_range(0..ODD.len())];
        block.extend(field(name, value));
    }
    if dice.gen_bool(0.1) {
        let odd: [&[u8]; 6] = [
            &[0x82, 0x84, 0x86],
            // An index, a length and a size of a table that no integer holds.
            &[0xff; 12],
            &[0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0x3f, 0xff, 0xff, 0xff, 0xff, 0x7f],
            // A length that is longer than the block, and a code of Huffman's that is none.
            &[0, 0x20, b'x'],
            &[0, 0x84, 0xff, 0xff, 0xff, 0xff, 0x01, b'v'],
        ];
        block.extend_from_slice(odd[dice.gen_range(0..odd.len())]);
    }
    block
}
