//! Tests of those parts of `make bench` whose errors would stay unnoticed: the pure ones, and the origins that count
//! and that fail. They are here because a bench without a harness is compiled without its tests.

#[path = "../bench/compare/bulk.rs"]
mod bulk;
#[path = "../bench/compare/counts.rs"]
mod counts;
#[path = "../bench/compare/figures.rs"]
mod figures;
#[path = "../bench/compare/h2load.rs"]
mod h2load;
#[path = "../bench/compare/latency.rs"]
mod latency;
#[path = "../bench/compare/moody.rs"]
mod moody;
#[path = "../bench/compare/procfs.rs"]
mod procfs;
#[path = "../bench/compare/wrk.rs"]
mod wrk;

mod of_wrk {
    use super::wrk::Summary;

    const QUIET: &str = "\
Running 3s test @ http://127.0.0.1:18080/small
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.60ms  450.11us  11.02ms   88.10%
    Req/Sec    40.11k     2.20k   44.50k    73.33%
  Latency Distribution
     50%  812.00us
     75%    1.71ms
     90%    1.90ms
     99%    2.05ms
  119750 requests in 3.01s, 27.41MB read
Requests/sec:  39784.05
Transfer/sec:      9.11MB
";

    #[test]
    fn a_quiet_run_is_read_whole() {
        let summary = Summary::parse(QUIET).unwrap();
        assert_eq!((summary.requests, summary.seconds, summary.failed), (119_750, 3.01, 0));
        assert!((summary.p50_ms - 0.812).abs() < 1e-9);
        assert!((summary.p99_ms - 2.05).abs() < 1e-9);
    }

    #[test]
    fn socket_errors_and_bad_statuses_are_counted_together() {
        let trouble =
            "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n";
        assert_eq!(Summary::parse(&format!("{QUIET}{trouble}")).unwrap().failed, 54_321);
    }

    #[test]
    fn every_unit_of_wrk_is_known() {
        for (written, seconds) in [("3.00s", 3.0), ("1.50m", 90.0), ("1.00h", 3600.0), ("20.00us", 2e-5)] {
            let summary = Summary::parse(&QUIET.replace("3.01s", written)).unwrap();
            assert!((summary.seconds - seconds).abs() < 1e-9, "{written}");
        }
    }

    #[test]
    fn an_output_without_figures_is_an_error_that_shows_it() {
        let error = Summary::parse("unable to connect to 127.0.0.1:1 Connection refused\n").unwrap_err();
        assert!(error.contains("no number of requests") && error.contains("Connection refused"), "{error}");
        let error = Summary::parse(&QUIET.replace("2.05ms", "-nanms")).unwrap_err();
        assert!(error.contains("no 99% latency"), "{error}");
    }
}

mod of_h2load {
    use super::wrk::Summary;

    const QUIET: &str = "\
finished in 1.02s, 160.00 req/s, 31.18KB/s
requests: 160 total, 176 started, 160 done, 157 succeeded, 3 failed, 2 errored, 0 timeout
status codes: 160 2xx, 0 3xx, 4 4xx, 3 5xx
traffic: 31.18KB (31933) total, 1.79KB (1830) headers (space savings 91.76%), 26.41KB (27040) data
";

    #[test]
    fn a_run_and_its_log_are_read_whole() {
        let log: String = (1..=200).map(|n| format!("1795993362861100\t200\t{}\n", n * 100)).collect();
        let summary = Summary::of_h2load(QUIET, &log).unwrap();
        assert_eq!((summary.requests, summary.seconds, summary.failed), (160, 1.02, 9));
        assert_eq!((summary.p50_ms, summary.p99_ms), (10.0, 19.8));
    }

    #[test]
    fn an_output_without_figures_is_an_error_that_shows_it() {
        let error = Summary::of_h2load("could not connect to host\n", "").unwrap_err();
        assert!(error.contains("no number of requests") && error.contains("could not connect"), "{error}");
        assert!(Summary::of_h2load(QUIET, "").unwrap_err().contains("noted no requests"));
    }
}

mod of_counts {
    use super::counts::Counts;

    #[test]
    fn what_was_counted_meanwhile_is_told_by_its_reason() {
        let text = |aborted: u32, shaken: u32| {
            format!(
                "# HELP forebay_refusals_total Refusals.\n\
                 forebay_refusals_total{{reason=\"header.aborted\",route=\"_none\"}} {aborted}\n\
                 forebay_refusals_total{{reason=\"header.aborted\",route=\"all\"}} 1\n\
                 forebay_refusals_total{{reason=\"header.timeout\",route=\"all\"}} 7\n\
                 forebay_tls_handshakes_total{{listener=\"web\",resumed=\"no\",version=\"TLSv1.3\"}} {shaken}\n\
                 forebay_workers 2\n"
            )
        };
        let (before, after) = (Counts::of(&text(1, 5)), Counts::of(&text(4, 25)));
        assert_eq!(after.since(&before).to_string(), "handshakes, resumed: no 20; header.aborted 3");
        assert_eq!(after.since(&before).names().count(), 2);
        assert_eq!(after.since(&after).to_string(), "nothing");
    }
}

mod of_procfs {
    use super::procfs::*;

    const STAT: &str = "4242 (a (b) c) S 1 4242 4242 0 -1 4194560 918 0 0 0 150 50 7 3 20 0 3 0 99 1000 200\n";

    #[test]
    fn user_and_system_time_add_up() {
        assert_eq!(cpu_seconds(STAT), Some(2.0));
        assert_eq!(cpu_seconds_with_children(STAT), Some(2.1));
    }

    #[test]
    fn a_line_cut_short_has_no_time() {
        assert_eq!(cpu_seconds("4242 (nginx) S 1 4242"), None);
        assert_eq!(cpu_seconds("4242 nginx S 1"), None);
        assert_eq!(cpu_seconds("4242 (nginx) S 1 2 3 4 5 6 7 8 9 10 eleven 12"), None);
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let rollup = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:                1848 kB\nPss:  900 kB\n";
        assert_eq!(resident_bytes(rollup), Some(1848 * 1024));
        assert_eq!(resident_bytes("Pss: 900 kB\n"), None);
        assert_eq!(peak_bytes("VmPeak:\t  900 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2 << 20));
        assert_eq!(peak_bytes("VmRSS: 900 kB\n"), None);
    }

    #[test]
    fn busy_time_is_all_but_idle_and_waiting_for_disks() {
        let stat = "cpu  100 10 200 5000 300 1 20 4 60 0\ncpu0 1 1 1 1\n";
        assert_eq!(busy_seconds(stat), Some(3.35));
        assert_eq!(busy_seconds("cpu  100 10\n"), None);
    }

    #[test]
    fn cpu_lists_hold_ranges_and_single_cpus() {
        assert_eq!(allowed_cpus("Name:\tx\nCpus_allowed_list:\t0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(allowed_cpus("Cpus_allowed_list:\tall\n"), None);
    }
}

mod of_latency {
    use std::time::Duration;

    use super::latency::{Sample, p99_ms};

    fn milliseconds(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// One request per millisecond. Responses take a millisecond, except during a stall: those are sent at its end.
    fn with_a_stall(from: u64, to: u64) -> Vec<Sample> {
        let latency = |due| if (from..to).contains(&due) { milliseconds(to - due) } else { milliseconds(1) };
        (0..1_000).map(|due| Sample { due: milliseconds(due), latency: latency(due) }).collect()
    }

    #[test]
    fn ninety_nine_of_a_hundred_stay_below() {
        assert_eq!(p99_ms(&with_a_stall(100, 110), milliseconds(0)..milliseconds(1_000)), Some(1.0));
        assert_eq!(p99_ms(&with_a_stall(100, 130), milliseconds(0)..milliseconds(1_000)), Some(20.0));
    }

    #[test]
    fn a_stall_counts_where_it_was_felt() {
        let samples = with_a_stall(100, 300);
        assert_eq!(p99_ms(&samples, milliseconds(0)..milliseconds(100)), Some(1.0));
        assert_eq!(p99_ms(&samples, milliseconds(100)..milliseconds(200)), Some(199.0));
        assert_eq!(p99_ms(&samples, milliseconds(300)..milliseconds(1_000)), Some(1.0));
        assert_eq!(p99_ms(&samples, milliseconds(1_000)..milliseconds(2_000)), None);
    }
}

mod of_the_moody_origin {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::thread;
    use std::time::Instant;

    use super::moody::{BE_FAILING, BE_SLOW, CHECKED, PAUSE, TIMES_SLOWER, serve};

    fn connected() -> BufReader<TcpStream> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(listener));
        BufReader::new(TcpStream::connect(address).unwrap())
    }

    fn status(connection: &mut BufReader<TcpStream>, path: &str) -> u16 {
        connection.get_mut().write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        let mut lines = [const { String::new() }; 3];
        for line in &mut lines {
            connection.read_line(line).unwrap();
        }
        std::io::Read::read_exact(connection, &mut [0; 2]).unwrap();
        lines[0].split(' ').nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn a_fifth_of_the_requests_to_a_failing_origin_fails_and_no_check_does() {
        let mut connection = connected();
        status(&mut connection, BE_FAILING);
        let failed = (0..20).filter(|_| status(&mut connection, "/small") == 500).count();
        assert_eq!(failed, 4);
        assert!((0..5).all(|_| status(&mut connection, CHECKED) == 200));
    }

    #[test]
    fn a_slow_origin_takes_its_time_for_each_request() {
        let mut connection = connected();
        status(&mut connection, BE_SLOW);
        let began = Instant::now();
        assert_eq!(status(&mut connection, "/small"), 200);
        assert!(began.elapsed() >= PAUSE * TIMES_SLOWER);
    }
}

mod of_the_bulk_origin {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
    use std::thread;

    use super::bulk::{Counts, LARGE_BYTES, serve};

    fn origin() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(listener));
        address
    }

    fn sent(address: SocketAddr, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn counts(stream: &mut TcpStream) -> Counts {
        stream.write_all(b"GET /counts HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = [0; 1_024];
        let read = stream.read(&mut answer).unwrap();
        let answer = std::str::from_utf8(&answer[..read]).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.parse().unwrap()
    }

    fn wait_for(address: SocketAddr, expected: Counts) {
        let mut stream = TcpStream::connect(address).unwrap();
        // A connection without a request counts as one, so the first result is discarded.
        counts(&mut stream);
        while counts(&mut stream) != expected {
            thread::yield_now();
        }
    }

    #[test]
    fn an_answer_that_is_not_read_keeps_a_backend_busy_until_it_is() {
        let address = origin();
        let mut stream = TcpStream::connect(address).unwrap();
        // So small that the kernel cannot buffer the response for a client that does not read.
        socket2::SockRef::from(&stream).set_recv_buffer_size(16 << 10).unwrap();
        stream.write_all(b"GET /4m HTTP/1.1\r\n\r\n").unwrap();
        wait_for(address, Counts { connections: 1, begun: 1, busy: 1 });
        let mut read = 0;
        while read < LARGE_BYTES {
            read += stream.read(&mut [0; 65_536]).unwrap();
        }
        wait_for(address, Counts { connections: 1, begun: 1, busy: 0 });
    }

    #[test]
    fn an_upload_that_pauses_keeps_a_backend_busy_until_it_is_whole_or_given_up() {
        let address = origin();
        let mut whole = sent(address, "POST /upload HTTP/1.1\r\nContent-Length: 5\r\n\r\nbe");
        let given_up = sent(address, "POST /upload HTTP/1.1\r\nContent-Length: 5\r\n\r\n");
        wait_for(address, Counts { connections: 2, begun: 2, busy: 2 });
        drop(given_up);
        wait_for(address, Counts { connections: 2, begun: 2, busy: 1 });
        whole.write_all(b"gun").unwrap();
        wait_for(address, Counts { connections: 2, begun: 2, busy: 0 });
    }

    #[test]
    fn a_connection_without_a_request_and_a_request_on_a_kept_one_both_bother_a_backend() {
        let counts = |connections, begun| Counts { connections, begun, busy: 0 };
        assert_eq!(counts(7, 3).bothered_since(&counts(2, 3)), 5);
        assert_eq!(counts(2, 9).bothered_since(&counts(2, 3)), 6);
        assert_eq!(counts(2, 3).to_string().parse(), Ok(counts(2, 3)));
        assert!("1 2".parse::<Counts>().is_err());
    }
}

mod of_figures {
    use serde_json::Value;

    use super::figures::*;

    const COLUMNS: &[Column] = &[
        Column { key: "cpu_seconds", heading: "CPU s", decimals: 2, compared: true },
        Column { key: "busy_percent", heading: "busy %", decimals: 0, compared: false },
    ];

    fn comparison() -> Comparison {
        let row = |name: &str, samples: &[[f64; 2]]| Row {
            name: name.to_owned(),
            samples: samples.iter().map(|round| round.to_vec()).collect(),
            judged: name == "forebay",
        };
        Comparison {
            cell: "small".to_owned(),
            title: "small GET".to_owned(),
            columns: COLUMNS,
            base: 1,
            rows: vec![
                row("forebay", &[[4.0, 99.0], [9.0, 98.0], [5.0, 100.0]]),
                row("nginx", &[[2.0, 97.0], [3.0, 99.0], [2.0, 98.0]]),
            ],
            goals: &[
                Goal { what: "CPU, x nginx", column: "cpu_seconds", over: Some("nginx"), must: 2.0, aim: Some(1.5) },
                Goal { what: "CPU, x caddy", column: "cpu_seconds", over: Some("caddy"), must: 1.0, aim: None },
                Goal { what: "busy", column: "busy_percent", over: None, must: 99.0, aim: None },
            ],
        }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_both() {
        let mut comparison = comparison();
        assert_eq!(comparison.median(0, 0), Some(5.0));
        comparison.rows[0].samples.pop();
        assert_eq!(comparison.median(0, 0), Some(6.5));
        comparison.rows[0].samples.clear();
        assert_eq!(comparison.median(0, 0), None);
    }

    #[test]
    fn ratios_pair_the_samples_of_one_round() {
        let ratio = comparison().ratio(0, 0);
        assert_eq!(ratio, Some(Ratio { median: 2.5, lowest: 2.0, highest: 3.0 }));
    }

    #[test]
    fn a_base_of_nothing_has_no_ratio() {
        let mut comparison = comparison();
        comparison.rows[1].samples[2][0] = 0.0;
        assert_eq!(comparison.ratio(0, 0), None);
        assert_eq!(summary(&[comparison]), "  small GET, CPU s  forebay to nginx  -\n");
    }

    #[test]
    fn the_table_shows_medians_and_ratios() {
        let expected = "small GET; ratios to nginx\n\
                        \x20          CPU s             ratio  busy %\n\
                        \x20 forebay   5.00  2.50 [2.00-3.00]      99\n\
                        \x20 nginx     2.00              1.00      98\n";
        assert_eq!(comparison().table(), expected);
    }

    #[test]
    fn the_summary_has_a_line_for_each_proxy_but_the_base() {
        assert_eq!(summary(&[comparison()]), "  small GET, CPU s  forebay to nginx  2.50\n");
    }

    #[test]
    fn a_goal_is_missed_met_or_met_with_its_aim() {
        let [goal, .., without_aim] = comparison().goals else { panic!("three goals") };
        assert_eq!(
            [2.01, 2.0, 1.5].map(|figure| goal.verdict(figure)),
            [Verdict::Missed, Verdict::Met, Verdict::Aimed]
        );
        assert_eq!(without_aim.verdict(0.0), Verdict::Met);
        assert_eq!(goal.verdict(f64::NAN), Verdict::Missed);
    }

    #[test]
    fn verdicts_judge_forebay_and_show_the_others() {
        let expected = "
  small: CPU, x nginx  <= 2, aim 1.5  forebay 2.50 MISSED   nginx 1.00
  small: CPU, x caddy           <= 1            forebay -      nginx -
  small: busy                  <= 99    forebay 99.00 met  nginx 98.00
";
        assert_eq!(verdicts(&[comparison()]), expected.trim_start_matches('\n'));
    }

    #[test]
    fn json_holds_the_verdicts() {
        let goals = comparison().json()["goals"].clone();
        assert_eq!(goals[0]["figures"]["forebay"], serde_json::json!({"figure": 2.5, "verdict": "MISSED"}));
        assert_eq!(goals[0]["figures"]["nginx"], serde_json::json!({"figure": 1.0, "verdict": null}));
        assert_eq!(goals[1]["figures"]["forebay"]["verdict"], Value::Null);
    }

    #[test]
    fn json_holds_the_samples_too() {
        let json = comparison().json();
        assert_eq!(json["base"], "nginx");
        assert_eq!(json["rows"][0]["median"]["cpu_seconds"], 5.0);
        assert_eq!(json["rows"][0]["ratio"]["cpu_seconds"]["highest"], 3.0);
        assert_eq!(json["rows"][0]["ratio"]["busy_percent"], Value::Null);
        assert_eq!(json["rows"][1]["rounds"][1]["cpu_seconds"], 3.0);
    }
}
