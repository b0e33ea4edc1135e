//! HTTP/2 clients that exceed limits: each is cut off with a reason, and refusals of the library itself are counted
//! and logged, too.

use crate::harness::frames::{ACK, END_HEADERS, END_STREAM, Frame, Frames, code, kind};
use crate::harness::gateway::Watched;
use crate::harness::{Gateway, H2Client, Origin, Setup};

/// A gateway for clear-text HTTP/2, with these listener keys.
fn h2c(origin: &Origin, keys: &str) -> Gateway {
    Setup::before(origin).listener("protocols: [h2c]").listener(keys).start()
}

/// This many copies of a frame.
fn many(count: usize, frame: &Frame) -> Vec<Frame> {
    vec![frame.clone(); count]
}

/// A client that sends a request and then all of these frames at once.
fn flood(gateway: &Gateway, frames: &[Frame]) -> Frames {
    let mut client = Frames::connect(gateway.web());
    client.send(&Frame::post(1));
    client.try_send_all(frames);
    client
}

#[test]
fn a_client_that_floods_is_cut_off_with_a_reason_and_others_are_served() {
    let origin = Origin::named("origin");
    let floods: [(&str, u64, Vec<Frame>); 9] = [
        ("header.h2_pings", 429, many(101, &Frame::ping([7; 8]))),
        ("header.h2_settings", 429, many(60, &Frame::new(kind::SETTINGS, 0, 0, [0, 4, 0, 0, 0, 9]))),
        ("header.h2_window_updates", 429, many(1_001, &Frame::credit(1, 1))),
        ("header.h2_priority", 429, many(410, &Frame::new(kind::PRIORITY, 0, 3, [0, 0, 0, 0, 9]))),
        ("header.h2_empty_data", 429, many(101, &Frame::new(kind::DATA, 0, 1, []))),
        ("header.h2_unknown_frames", 429, many(101, &Frame::new(0xbe, 0, 0, [1; 9]))),
        ("header.h2_unknown_frames", 429, many(101, &Frame::new(kind::PING, ACK, 0, [1; 8]))),
        ("header.h2_continuation", 431, {
            let begin = Frame::new(kind::HEADERS, END_STREAM, 3, [0x82]);
            [vec![begin], many(6, &Frame::new(kind::CONTINUATION, 0, 3, []))].concat()
        }),
        ("header.h2_resets", 429, {
            let given_up = |n: u32| [Frame::get(2 * n + 3), Frame::reset(2 * n + 3, code::CANCEL)];
            (0..201).flat_map(given_up).collect()
        }),
    ];
    for (reason, status, frames) in floods {
        let gateway = h2c(&origin, "");
        let other = H2Client::connect(gateway.web());
        assert_eq!(other.get("/").status, 200);
        assert_eq!(flood(&gateway, &frames).goodbye(), code::ENHANCE_YOUR_CALM, "{reason}");
        let selector = format!("forebay_refusals_total{{reason=\"{reason}\"}}");
        gateway.wait_metric(&selector, |count| count == 1.0);
        let line = gateway.log_line_of_status(status);
        assert_eq!(line.reason(), reason);
        assert_eq!(other.get("/").status, 200, "{reason}: the others");
        drop(other);
        gateway.wait_metric("forebay_client_connections", |count| count == 0.0);
        gateway.wait_at_rest();
    }
}

#[test]
fn what_a_client_may_do_is_a_key_of_its_listener() {
    let origin = Origin::named("origin");
    let strict = h2c(&origin, "http2: { pings: 1/s }");
    assert_eq!(flood(&strict, &many(11, &Frame::ping([7; 8]))).goodbye(), code::ENHANCE_YOUR_CALM);
    let lenient = h2c(&origin, "http2: { pings: 1k/s }");
    let mut client = flood(&lenient, &many(500, &Frame::ping([7; 8])));
    for _ in 0..500 {
        assert_eq!(client.until(kind::PING).flags, ACK);
    }
    client.send(&Frame::get(3));
    assert_eq!(client.until(kind::HEADERS).status(), Some(200));
}

#[test]
fn a_client_that_provokes_resets_is_cut_off() {
    let origin = Origin::scripted();
    let gateway = h2c(&origin, "http2: { provoked_resets: 20 }");
    let mut client = Frames::connect(gateway.web());
    // A window overflow is a stream error that makes the gateway reset the stream (RFC 9113 §6.9.1).
    let provoked = |n: u32| [Frame::get(2 * n + 1), Frame::credit(2 * n + 1, (1 << 31) - 1)];
    client.try_send_all(&(0..21).flat_map(provoked).collect::<Vec<_>>());
    assert_eq!(client.goodbye(), code::ENHANCE_YOUR_CALM);
    gateway.wait_metric("forebay_refusals_total{reason=\"header.h2_provoked_resets\"}", |count| count == 1.0);
    gateway.wait_at_rest();
}

#[test]
fn resets_that_keep_to_the_rate_end_the_connection_all_the_same() {
    let origin = Origin::named("origin");
    let gateway = h2c(&origin, "http2: { resets: 1k/s }");
    let mut client = Frames::connect(gateway.web());
    let mut cut = false;
    for n in 0..300 {
        cut |= !client.try_send_all(&[Frame::get(2 * n + 1), Frame::reset(2 * n + 1, code::CANCEL)]);
        if cut || n % 20 != 19 {
            continue;
        }
        client.send(&Frame::ping([1; 8]));
        cut = loop {
            match client.next() {
                Some(frame) if frame.kind == kind::PING => break false,
                Some(frame) if frame.kind == kind::GOAWAY => {
                    assert_eq!(frame.code(), code::ENHANCE_YOUR_CALM);
                    break true;
                }
                Some(_) => {}
                None => break true,
            }
        };
        if cut {
            assert!((198..=240).contains(&n), "cut off after {n}");
            break;
        }
    }
    assert!(cut);
    gateway.wait_metric("forebay_refusals_total{reason=\"header.h2_resets\"}", |count| count == 1.0);
}

#[test]
fn what_the_library_refuses_leaves_a_metric_and_a_line() {
    let origin = Origin::scripted();
    let cases = [
        ("limits: { streams: 1 }", "header.h2_streams", 429, vec![Frame::post(1), Frame::get(3)]),
        ("limits: { header_bytes: 1KiB }", "header.too_large", 431, {
            let large = [&Frame::get(1).payload[..], &[0, 1, b'x', 0x7f, 0xd1, 0x0e], &[b'a'; 2_000]].concat();
            vec![Frame::new(kind::HEADERS, END_HEADERS | END_STREAM, 1, large)]
        }),
        ("", "header.malformed", 400, {
            let without_path = [0x82, 0x86, 0x41, 4, b't', b'e', b's', b't'];
            vec![Frame::new(kind::HEADERS, END_HEADERS | END_STREAM, 1, without_path)]
        }),
        // DATA on an idle stream.
        ("", "header.h2_protocol", 400, vec![Frame::new(kind::DATA, 0, 5, [1])]),
        // A header list far above the limit.
        ("limits: { header_bytes: 1KiB }", "header.too_large", 431, {
            let large = [&Frame::get(1).payload[..], &[0, 1, b'x', 0x7f, 0x91, 0x4d], &[b'a'; 10_000]].concat();
            vec![Frame::new(kind::HEADERS, END_HEADERS | END_STREAM, 1, large)]
        }),
    ];
    for (keys, reason, status, frames) in cases {
        let gateway = h2c(&origin, keys);
        let mut client = Frames::connect(gateway.web());
        client.try_send_all(&frames);
        let selector = format!("forebay_refusals_total{{reason=\"{reason}\"}}");
        gateway.wait_metric(&selector, |count| count == 1.0);
        let line = gateway.log_line_of_status(status);
        assert_eq!(line.reason(), reason);
    }
}
