//! The pure parts of `make bench`. They are tested here because a bench without a harness is compiled without its tests.

#[path = "../bench/compare/figures.rs"]
mod figures;
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
    fn json_holds_the_samples_too() {
        let json = comparison().json();
        assert_eq!(json["base"], "nginx");
        assert_eq!(json["rows"][0]["median"]["cpu_seconds"], 5.0);
        assert_eq!(json["rows"][0]["ratio"]["cpu_seconds"]["highest"], 3.0);
        assert_eq!(json["rows"][0]["ratio"]["busy_percent"], Value::Null);
        assert_eq!(json["rows"][1]["rounds"][1]["cpu_seconds"], 3.0);
    }
}
