//! The format of access log lines.
//!
//! Most of a line comes from untrusted clients, so it is escaped: it can neither end the line nor control a
//! terminal. Any bytes give exactly one line, and in JSON one object. Times are in milliseconds with three
//! decimals, truncated instead of rounded, and the total is the sum of the phases as printed, so that a line adds
//! up.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Line;
use crate::phase::{Clock, Phase};
use crate::printable::{address, digits, escape, steers, three_digits};

/// Initial size of the buffer for a line. A line without long texts fits.
const LINE_BYTES: usize = 512;

/// One JSON object. Bytes that are not UTF-8 are written as the text `\xNN`.
///
/// The phases are one object, in the order of an exchange.
pub(super) fn json(line: &mut Vec<u8>, &Line { finished, fields }: &Line<'_>) {
    line.reserve(LINE_BYTES);
    line.extend_from_slice(b"{\"time\":\"");
    line.extend_from_slice(&rfc3339(finished.time));
    line.push(b'"');
    text(line, ",\"listener\":\"", finished.client.listener.as_bytes());
    if let Some(client) = finished.client.address {
        line.extend_from_slice(b",\"client\":\"");
        address(line, client);
        line.push(b'"');
    }
    text(line, ",\"method\":\"", finished.request.method.as_bytes());
    text(line, ",\"host\":\"", finished.request.host);
    text(line, ",\"target\":\"", finished.request.target);
    text(line, ",\"protocol\":\"", finished.request.protocol.as_bytes());
    number(line, ",\"status\":", finished.summary.status.into());
    number(line, ",\"received\":", finished.summary.received);
    number(line, ",\"sent\":", finished.summary.sent);
    millis(line, ",\"total_ms\":", total(finished.summary.clock));
    millis(line, ",\"own_ms\":", micros(finished.summary.own));
    line.extend_from_slice(b",\"phases\":{");
    for (place, (phase, spent)) in visited(finished.summary.clock).enumerate() {
        line.extend_from_slice(if place == 0 { b"\"" } else { b",\"" });
        line.extend_from_slice(phase.name().as_bytes());
        millis(line, "\":", spent);
    }
    line.push(b'}');
    text(line, ",\"route\":\"", finished.routing.route.as_bytes());
    option(line, ",\"upstream\":\"", finished.routing.upstream.map(str::as_bytes));
    option(line, ",\"endpoint\":\"", finished.routing.endpoint.map(str::as_bytes));
    number(line, ",\"attempts\":", finished.routing.attempts.into());
    option(line, ",\"handed_over\":\"", finished.routing.handed_over.map(str::as_bytes));
    for (place, failed) in finished.routing.failed.iter().enumerate() {
        line.extend_from_slice(if place == 0 { b",\"failed\":[{" } else { b",{" });
        line.extend_from_slice(b"\"endpoint\":\"");
        escape_json(line, failed.endpoint.as_bytes());
        put(line, format_args!("\",\"phase\":\"{}\",\"reason\":\"{}\"", failed.phase.name(), failed.why));
        millis(line, ",\"ms\":", micros(failed.took));
        line.push(b'}');
    }
    if !finished.routing.failed.is_empty() {
        line.push(b']');
    }
    if finished.buffered > 0 {
        number(line, ",\"buffered\":", finished.buffered);
    }
    if finished.spilled > 0 {
        number(line, ",\"spilled\":", finished.spilled);
    }
    if let Some(held) = finished.summary.held {
        millis(line, ",\"held_ms\":", micros(held));
    }
    if !finished.summary.saved.is_zero() {
        millis(line, ",\"saved_ms\":", micros(finished.summary.saved));
    }
    option(line, ",\"reason\":\"", finished.reason().map(str::as_bytes));
    if let Some(status) = finished.grpc_status {
        number(line, ",\"grpc_status\":", status.into());
    }
    option(line, ",\"request_id\":\"", finished.request.id);
    option(line, ",\"tls\":\"", finished.client.tls.map(str::as_bytes));
    option(line, ",\"client_subject\":\"", finished.client.subject.map(str::as_bytes));
    if let Some(trace) = finished.trace {
        put(line, format_args!(",\"trace_id\":\"{trace}\""));
    }
    option(line, ",\"referer\":\"", finished.request.referer);
    option(line, ",\"user_agent\":\"", finished.request.user_agent);
    fields.iter().for_each(|(name, text)| json_text(line, name, text));
    line.extend_from_slice(b"}\n");
}

/// The combined format of Apache and nginx, followed by `key=value` for additional data.
///
/// Bytes other than printable ASCII, and `"` and `\`, are written `\xNN`, as in nginx.
pub(super) fn combined(line: &mut Vec<u8>, &Line { finished, fields }: &Line<'_>) {
    match finished.client.address {
        Some(client) => address(line, client),
        None => line.push(b'-'),
    }
    line.extend_from_slice(b" - - [");
    line.extend_from_slice(&common_log_time(finished.time));
    line.extend_from_slice(b"] \"");
    if finished.request.method.is_empty() {
        line.push(b'-');
    } else {
        escape_combined(line, finished.request.method.as_bytes());
        line.push(b' ');
        escape_combined(line, finished.request.target);
        line.push(b' ');
        escape_combined(line, finished.request.protocol.as_bytes());
    }
    put(line, format_args!("\" {:03}", finished.summary.status));
    number(line, " ", finished.summary.sent);
    combined_text(line, " ", finished.request.referer);
    combined_text(line, " ", finished.request.user_agent);
    millis(line, " total_ms=", total(finished.summary.clock));
    millis(line, " own_ms=", micros(finished.summary.own));
    line.extend_from_slice(b" phases=\"");
    for (place, (phase, spent)) in visited(finished.summary.clock).enumerate() {
        line.extend_from_slice(if place == 0 { b"" } else { b" " });
        line.extend_from_slice(phase.name().as_bytes());
        millis(line, "=", spent);
    }
    line.push(b'"');
    combined_text(line, " listener=", Some(finished.client.listener.as_bytes()));
    combined_text(line, " host=", Some(finished.request.host));
    number(line, " received=", finished.summary.received);
    combined_text(line, " route=", Some(finished.routing.route.as_bytes()));
    combined_text(line, " upstream=", finished.routing.upstream.map(str::as_bytes));
    combined_text(line, " endpoint=", finished.routing.endpoint.map(str::as_bytes));
    number(line, " attempts=", finished.routing.attempts.into());
    for (place, failed) in finished.routing.failed.iter().enumerate() {
        line.extend_from_slice(if place == 0 { b" failed=\"" } else { b", " });
        escape_combined(line, failed.endpoint.as_bytes());
        put(line, format_args!(" {} {}", failed.phase.name(), failed.why));
        millis(line, " ", micros(failed.took));
    }
    line.extend_from_slice(if finished.routing.failed.is_empty() { b" failed=-" } else { b"\"" });
    combined_text(line, " handed_over=", finished.routing.handed_over.map(str::as_bytes));
    combined_text(line, " reason=", finished.reason().map(str::as_bytes));
    match finished.grpc_status {
        Some(status) => number(line, " grpc_status=", status.into()),
        None => line.extend_from_slice(b" grpc_status=-"),
    }
    combined_text(line, " request_id=", finished.request.id);
    number(line, " buffered=", finished.buffered);
    number(line, " spilled=", finished.spilled);
    match finished.summary.held {
        Some(held) => millis(line, " held_ms=", micros(held)),
        None => line.extend_from_slice(b" held_ms=-"),
    }
    millis(line, " saved_ms=", micros(finished.summary.saved));
    combined_text(line, " tls=", finished.client.tls.map(str::as_bytes));
    combined_text(line, " client_subject=", finished.client.subject.map(str::as_bytes));
    match finished.trace {
        Some(trace) => put(line, format_args!(" trace_id={trace}")),
        None => line.extend_from_slice(b" trace_id=-"),
    }
    for (name, text) in fields {
        line.push(b' ');
        line.extend_from_slice(name.as_bytes());
        combined_text(line, "=", Some(text));
    }
    line.push(b'\n');
}

fn put(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a vector cannot fail.
    let _ = line.write_fmt(text);
}

/// Writes `key`, which ends in a quotation mark, and this JSON text, if any.
#[inline]
fn option(line: &mut Vec<u8>, key: &'static str, value: Option<&[u8]>) {
    if let Some(value) = value {
        text(line, key, value);
    }
}

/// Writes `key`, which ends in a quotation mark, and this JSON text. Inlined, since a key of known length is copied
/// without a call.
#[inline]
fn text(line: &mut Vec<u8>, key: &'static str, value: &[u8]) {
    line.extend_from_slice(key.as_bytes());
    escape_json(line, value);
    line.push(b'"');
}

fn json_text(line: &mut Vec<u8>, key: &str, value: &[u8]) {
    line.extend_from_slice(b",\"");
    line.extend_from_slice(key.as_bytes());
    text(line, "\":\"", value);
}

fn combined_text(line: &mut Vec<u8>, key: &str, value: Option<&[u8]>) {
    line.extend_from_slice(key.as_bytes());
    line.push(b'"');
    escape_combined(line, value.unwrap_or(b"-"));
    line.push(b'"');
}

/// Whether no byte needs escaping in either format. Checks eight bytes at a time, since most of a line is plain
/// text.
fn are_plain(bytes: &[u8]) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    // Sets the highest bit of each byte less than `n`, and possibly of higher bytes: only whether any bit is set
    // matters.
    let less = |word: u64, n: u8| word.wrapping_sub(ONES * u64::from(n)) & !word & HIGH;
    let is = |word: u64, byte: u8| less(word ^ (ONES * u64::from(byte)), 1);
    let (words, rest) = bytes.as_chunks::<8>();
    let odd = words.iter().fold(0, |odd, word| {
        let word = u64::from_le_bytes(*word);
        odd | (word & HIGH) | less(word, b' ') | is(word, b'"') | is(word, b'\\') | is(word, 0x7f)
    });
    odd == 0 && rest.iter().copied().all(is_plain)
}

/// Whether a byte needs no escaping in either format.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

/// Escapes a JSON string; bytes that are not UTF-8 become the text `\xNN`.
pub fn escape_json(line: &mut Vec<u8>, bytes: &[u8]) {
    if are_plain(bytes) {
        return line.extend_from_slice(bytes);
    }
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '"' | '\\' => line.extend_from_slice(&[b'\\', char as u8]),
                _ if steers(char) => escape(char, |unit| put(line, format_args!("\\u{unit:04x}"))),
                _ => line.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        for byte in chunk.invalid() {
            put(line, format_args!("\\\\x{byte:02X}"));
        }
    }
}

/// Escapes a field of the combined format: all except printable ASCII, and `"` and `\`, become `\xNN`.
pub fn escape_combined(line: &mut Vec<u8>, bytes: &[u8]) {
    if are_plain(bytes) {
        return line.extend_from_slice(bytes);
    }
    for &byte in bytes {
        if is_plain(byte) {
            line.push(byte);
        } else {
            put(line, format_args!("\\x{byte:02X}"));
        }
    }
}

/// Writes `key` and a number. Hand-written, since a line has about twenty numbers: it takes 760 ns, and 1,270 ns
/// with `format_args!`.
#[inline]
fn number(line: &mut Vec<u8>, key: &'static str, number: u64) {
    line.extend_from_slice(key.as_bytes());
    digits(line, number, 1);
}

/// Writes `key` and these microseconds as milliseconds with three decimals.
#[inline]
fn millis(line: &mut Vec<u8>, key: &'static str, micros: u64) {
    number(line, key, micros / 1_000);
    let [tenths, hundredths, thousandths] = three_digits((micros % 1_000) as u32);
    line.extend_from_slice(&[b'.', tenths, hundredths, thousandths]);
}

/// Whole microseconds. Not `as_micros`, which divides 128 bits; 64 bits hold half a million years.
fn micros(time: Duration) -> u64 {
    time.as_secs().saturating_mul(1_000_000).saturating_add(time.subsec_micros().into())
}

/// The phases that the exchange entered, in order, with their microseconds.
fn visited(clock: &Clock) -> impl Iterator<Item = (Phase, u64)> {
    Phase::ALL.into_iter().filter_map(|phase| Some((phase, micros(clock.spent(phase)?))))
}

fn total(clock: &Clock) -> u64 {
    visited(clock).map(|(_, spent)| spent).fold(0, u64::saturating_add)
}

thread_local! {
    /// The second that this thread formatted last, and its text.
    static SECOND: Cell<(u64, [u8; 24])> = const { Cell::new((u64::MAX, [b'0'; 24])) };
}

/// `2000-10-10T13:55:36.123Z`. Within the same second, only the milliseconds are formatted again.
fn rfc3339(time: SystemTime) -> [u8; 24] {
    let Ok(since) = time.duration_since(UNIX_EPOCH) else { return whole_rfc3339(time) };
    let (second, mut text) = SECOND.get();
    if second != since.as_secs() {
        text = whole_rfc3339(time);
        SECOND.set((since.as_secs(), text));
        return text;
    }
    text[20..23].copy_from_slice(&three_digits(since.subsec_millis()));
    text
}

fn whole_rfc3339(time: SystemTime) -> [u8; 24] {
    // Outside this range, which only a wrong clock can reach, humantime would panic or fail.
    let last = UNIX_EPOCH + Duration::from_secs(253_402_300_799);
    let mut text = [b'0'; 24];
    // It has exactly 24 bytes.
    let _ = write!(&mut text[..], "{}", humantime::format_rfc3339_millis(time.clamp(UNIX_EPOCH, last)));
    text
}

/// `10/Oct/2000:13:55:36 +0000`, built from the parts of [`rfc3339`].
fn common_log_time(time: SystemTime) -> [u8; 26] {
    const MONTHS: &[u8; 36] = b"JanFebMarAprMayJunJulAugSepOctNovDec";
    let text = rfc3339(time);
    let month = usize::from((text[5] - b'0') * 10 + (text[6] - b'0')) - 1;
    let mut log_time = *b"DD/MMM/YYYY:hh:mm:ss +0000";
    log_time[0..2].copy_from_slice(&text[8..10]);
    log_time[3..6].copy_from_slice(&MONTHS[3 * month..3 * month + 3]);
    log_time[7..11].copy_from_slice(&text[0..4]);
    log_time[12..20].copy_from_slice(&text[11..19]);
    log_time
}

#[cfg(test)]
pub(super) mod tests {
    use std::borrow::Cow;
    use std::time::Instant;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::config::server::AccessLog;
    use crate::error::refusal;
    use crate::expression::named::NamedText;
    use crate::finished::{Client, Failed, Finished, Request, Routing, Why};
    use crate::metrics::Summary;
    use crate::spans::TraceId;

    proptest! {
        #[test]
        fn a_text_is_plain_if_each_of_its_bytes_is(bytes in prop::collection::vec(any::<u8>(), 0..40), odd in any::<u8>()) {
            prop_assert_eq!(are_plain(&bytes), bytes.iter().copied().all(is_plain));
            let mut text = vec![b'a'; 23];
            text[usize::from(odd) % 23] = odd;
            prop_assert_eq!(are_plain(&text), is_plain(odd));
        }

        #[test]
        fn a_time_is_written_the_same_whatever_was_written_before(millis in prop::collection::vec(0u64..5_000, 1..20)) {
            for millis in millis {
                let time = time() + Duration::from_millis(millis);
                prop_assert_eq!(rfc3339(time), whole_rfc3339(time));
            }
        }
    }

    /// 2000-10-10T13:55:36.123Z
    fn time() -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(971_186_136_123)
    }

    fn clock() -> Clock {
        let start = Instant::now();
        let mut clock = Clock::start(Phase::Header, start);
        clock.enter(Phase::Wait, start + Duration::from_micros(120));
        clock.enter(Phase::Finish, start + Duration::from_micros(5_120));
        clock.settle(start + Duration::from_micros(5_129));
        clock
    }

    pub(in super::super) fn finished(clock: &Clock) -> Finished<'_> {
        let own = Duration::from_micros(41);
        let summary = Summary { own, status: 200, received: 310, sent: 5_120, ..Summary::new(clock) };
        let client = Client { listener: "web", address: Some([192, 0, 2, 7].into()), ..Client::default() };
        Finished {
            time: time(),
            request: Request {
                method: "GET",
                host: b"shop.example.com",
                target: b"/cart?id=7",
                protocol: "HTTP/1.1",
                user_agent: Some(b"curl/8.5.0"),
                ..Request::default()
            },
            routing: Routing {
                route: "shop",
                upstream: Some("app"),
                endpoint: Some("127.0.0.1:3000"),
                attempts: 1,
                ..Routing::default()
            },
            ..Finished::new(Instant::now(), client, summary)
        }
    }

    fn written(write: fn(&mut Vec<u8>, &Line<'_>), finished: &Finished<'_>, fields: &[NamedText<'_>]) -> String {
        let mut line = Vec::new();
        write(&mut line, &Line { finished, fields });
        String::from_utf8(line).unwrap()
    }

    fn json_of(finished: &Finished<'_>) -> String {
        written(json, finished, &[])
    }

    fn combined_of(finished: &Finished<'_>) -> String {
        written(combined, finished, &[])
    }

    #[test]
    fn a_line_of_json_has_the_phases_in_their_order_and_leaves_out_what_is_not() {
        let clock = clock();
        let expected = concat!(
            r#"{"time":"2000-10-10T13:55:36.123Z","listener":"web","client":"192.0.2.7","method":"GET","#,
            r#""host":"shop.example.com","target":"/cart?id=7","protocol":"HTTP/1.1","status":200,"#,
            r#""received":310,"sent":5120,"total_ms":5.129,"own_ms":0.041,"#,
            r#""phases":{"header":0.120,"wait":5.000,"finish":0.009},"#,
            r#""route":"shop","upstream":"app","endpoint":"127.0.0.1:3000","attempts":1,"#,
            r#""user_agent":"curl/8.5.0"}"#,
            "\n",
        );
        assert_eq!(json_of(&finished(&clock)), expected);
    }

    #[test]
    fn further_fields_stand_at_the_end_and_cannot_end_the_line() {
        let clock = clock();
        let fields =
            [("tenant", Cow::Borrowed(b"shop".as_slice())), ("who", Cow::Borrowed(b"a\"\r\nb\xff".as_slice()))];
        let finished = finished(&clock);
        let line = written(json, &finished, &fields);
        assert_eq!(line.matches('\n').count(), 1);
        let json: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((json["tenant"].as_str(), json["who"].as_str()), (Some("shop"), Some("a\"\r\nb\\xFF")));
        let line = written(combined, &finished, &fields);
        assert!(line.ends_with(" tenant=\"shop\" who=\"a\\x22\\x0D\\x0Ab\\xFF\"\n"), "{line}");
        assert_eq!(line.matches('\n').count(), 1);
    }

    #[test]
    fn every_field_of_a_line_is_reserved() {
        let clock = clock();
        let failed = [Failed { endpoint: "a".into(), phase: Phase::Wait, why: Why::Status(503), took: Duration::ZERO }];
        let mut finished = finished(&clock);
        finished.buffered = 1;
        finished.spilled = 1;
        finished.summary.held = Some(Duration::from_secs(1));
        finished.summary.saved = Duration::from_secs(1);
        finished.routing.failed = &failed;
        finished.summary.refusal = Some(&refusal::WAIT_TIMEOUT);
        finished.grpc_status = Some(14);
        finished.request.id = Some(b"x");
        finished.client.tls = Some("TLSv1.3");
        finished.client.subject = Some("CN=x");
        finished.trace = Some(TraceId(7));
        finished.request.referer = Some(b"x");
        let json: Value = serde_json::from_str(&json_of(&finished)).unwrap();
        let found: std::collections::BTreeSet<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(found, AccessLog::FIELDS.iter().copied().collect());
    }

    #[test]
    fn a_combined_line_begins_as_apache_and_nginx_write_it() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.request.referer = Some(b"a \"quote\"");
        finished.summary.refusal = Some(&refusal::WAIT_TIMEOUT);
        let expected = concat!(
            r#"192.0.2.7 - - [10/Oct/2000:13:55:36 +0000] "GET /cart?id=7 HTTP/1.1" 200 5120 "a \x22quote\x22" "curl/8.5.0""#,
            r#" total_ms=5.129 own_ms=0.041 phases="header=0.120 wait=5.000 finish=0.009""#,
            r#" listener="web" host="shop.example.com" received=310 route="shop" upstream="app" endpoint="127.0.0.1:3000""#,
            r#" attempts=1 failed=- handed_over="-" reason="wait.timeout" grpc_status=- request_id="-""#,
            " buffered=0 spilled=0 held_ms=- saved_ms=0.000 tls=\"-\" client_subject=\"-\" trace_id=-\n",
        );
        assert_eq!(combined_of(&finished), expected);
    }

    #[test]
    fn what_was_held_back_and_saved_stands_in_both_formats() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.buffered = 4_194_304;
        finished.spilled = 4_128_768;
        finished.summary.held = Some(Duration::from_micros(26_400));
        finished.summary.saved = Duration::from_micros(2_097_001);
        let json = json_of(&finished);
        let said = r#""attempts":1,"buffered":4194304,"spilled":4128768,"held_ms":26.400,"saved_ms":2097.001,"#;
        assert!(json.contains(said), "{json}");
        let line = combined_of(&finished);
        assert!(
            line.ends_with(" buffered=4194304 spilled=4128768 held_ms=26.400 saved_ms=2097.001 tls=\"-\" client_subject=\"-\" trace_id=-\n"),
            "{line}"
        );
    }

    #[test]
    fn how_a_grpc_call_went_is_said_in_both_formats() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.grpc_status = Some(14);
        finished.summary.status = 503;
        finished.summary.refusal = Some(&refusal::QUEUE_FULL);
        let json: Value = serde_json::from_str(&json_of(&finished)).unwrap();
        assert_eq!((&json["status"], &json["grpc_status"]), (&503.into(), &14.into()));
        assert!(combined_of(&finished).contains(r#" reason="queue.full" grpc_status=14 request_id="#));
    }

    #[test]
    fn a_trace_is_named_in_both_formats() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.trace = Some(TraceId(0x4bf9));
        let id = "00000000000000000000000000004bf9";
        assert!(json_of(&finished).contains(&format!(r#""trace_id":"{id}""#)));
        assert!(combined_of(&finished).ends_with(&format!(" trace_id={id}\n")));
    }

    #[test]
    fn who_a_client_has_proved_to_be_stands_in_both_formats() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.client.tls = Some("TLSv1.3");
        finished.client.subject = Some("CN=Ada,O=\"x\"");
        assert!(json_of(&finished).contains(r#","tls":"TLSv1.3","client_subject":"CN=Ada,O=\"x\"""#));
        assert!(combined_of(&finished).contains(r#" tls="TLSv1.3" client_subject="CN=Ada,O=\x22x\x22" trace_id=-"#));
    }

    #[test]
    fn attempts_that_came_to_nothing_are_listed() {
        let clock = clock();
        let failed = |phase, why| Failed { endpoint: "a\"b:80".into(), phase, why, took: Duration::from_micros(120) };
        let failed = [failed(Phase::Connect, Why::Refusal("connect.refused")), failed(Phase::Wait, Why::Status(503))];
        let mut finished = finished(&clock);
        finished.routing.failed = &failed;
        let json: Value = serde_json::from_str(&json_of(&finished)).unwrap();
        let expected = serde_json::json!([
            { "endpoint": "a\"b:80", "phase": "connect", "reason": "connect.refused", "ms": 0.12 },
            { "endpoint": "a\"b:80", "phase": "wait", "reason": "status 503", "ms": 0.12 },
        ]);
        assert_eq!(json["failed"], expected);
        let expected = r#" failed="a\x22b:80 connect connect.refused 0.120, a\x22b:80 wait status 503 0.120""#;
        assert!(combined_of(&finished).contains(expected), "{}", combined_of(&finished));
    }

    #[test]
    fn a_request_that_was_not_understood_has_a_line_too() {
        let clock = clock();
        let mut finished = finished(&clock);
        finished.client.address = None;
        finished.request.method = "";
        finished.request.target = b"";
        finished.request.protocol = "";
        finished.summary.status = 0;
        assert!(combined_of(&finished).starts_with("- - - [10/Oct/2000:13:55:36 +0000] \"-\" 000 5120 \"-\" "));
        let json: Value = serde_json::from_str(&json_of(&finished)).unwrap();
        assert_eq!(json["status"], 0);
        assert_eq!(json["client"], Value::Null);
    }

    #[test]
    fn a_line_adds_up_although_times_are_cut() {
        let start = Instant::now();
        let mut clock = Clock::start(Phase::Header, start);
        clock.credit(Phase::Accept, Duration::from_nanos(1_999));
        clock.settle(start + Duration::from_nanos(2_999));
        let json: Value = serde_json::from_str(&json_of(&finished(&clock))).unwrap();
        assert_eq!(json["phases"], serde_json::json!({ "accept": 0.001, "header": 0.002 }));
        assert_eq!(json["total_ms"], 0.003);
    }

    #[test]
    fn numbers_have_all_their_digits() {
        let written = |micros| {
            let mut line = Vec::new();
            millis(&mut line, "", micros);
            String::from_utf8(line).unwrap()
        };
        assert_eq!(written(0), "0.000");
        assert_eq!(written(1_000), "1.000");
        assert_eq!(written(10_020), "10.020");
        assert_eq!(written(u64::MAX), "18446744073709551.615");
    }

    #[test]
    fn a_clock_that_is_set_absurdly_makes_no_panic() {
        for time in [UNIX_EPOCH - Duration::from_secs(1), UNIX_EPOCH + Duration::from_secs(1 << 40)] {
            assert!(rfc3339(time).ends_with(b"Z"));
            assert!(common_log_time(time).ends_with(b" +0000"));
        }
    }

    #[test]
    fn nothing_in_a_line_can_end_it_or_steer_a_terminal() {
        let clock = clock();
        let nasty = "\u{1b}[31m\r\n\u{85}\u{2028}\u{9b}ü\u{7f}\u{202e}".as_bytes();
        let mut finished = finished(&clock);
        (finished.request.target, finished.request.host) = (nasty, b"\xff\"\\");
        let line = json_of(&finished);
        let target = r#""target":"\u001b[31m\u000d\u000a\u0085\u2028\u009bü\u007f\u202e""#;
        assert!(line.contains(target), "{line}");
        assert!(line.contains(r#""host":"\\xFF\"\\""#), "{line}");
    }

    /// Undoes [`escape_combined`].
    fn unescape(text: &str) -> Vec<u8> {
        let mut pieces = text.split("\\x");
        let mut bytes = pieces.next().unwrap().as_bytes().to_vec();
        for piece in pieces {
            bytes.push(u8::from_str_radix(&piece[..2], 16).unwrap());
            bytes.extend_from_slice(&piece.as_bytes()[2..]);
        }
        bytes
    }

    fn is_one_line(line: &str) -> bool {
        line.ends_with('\n') && line.lines().count() == 1 && !line[..line.len() - 1].chars().any(char::is_control)
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_json_is_one_line_and_one_object(bytes: Vec<u8>, text: String) {
            let clock = clock();
            let mut finished = finished(&clock);
            finished.request.method = &text;
            finished.request.host = &bytes;
            finished.request.target = &bytes;
            finished.request.id = Some(text.as_bytes());
            finished.request.referer = Some(&bytes);
            finished.request.user_agent = Some(text.as_bytes());
            let line = json_of(&finished);
            prop_assert!(is_one_line(&line), "{line}");
            let json: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&json["method"], &Value::from(text.as_str()));
            prop_assert_eq!(&json["user_agent"], &Value::from(text.as_str()));
            if let Ok(text) = std::str::from_utf8(&bytes) {
                prop_assert_eq!(&json["target"], &Value::from(text));
            }
        }

        #[test]
        fn whatever_the_bytes_a_combined_line_gives_them_back(bytes: Vec<u8>, text: String) {
            let clock = clock();
            let mut finished = finished(&clock);
            finished.request.method = "GET";
            finished.request.target = &bytes;
            finished.request.user_agent = Some(text.as_bytes());
            let line = combined_of(&finished);
            prop_assert!(is_one_line(&line) && line.is_ascii(), "{line}");
            let fields: Vec<&str> = line.split('"').collect();
            let target = fields[1].strip_prefix("GET ").unwrap().strip_suffix(" HTTP/1.1").unwrap();
            prop_assert_eq!(unescape(target), bytes);
            prop_assert_eq!(unescape(fields[5]), text.as_bytes());
        }
    }
}
