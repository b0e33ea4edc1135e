//! Endpoint discovery: names and services in a real DNS server, and files, which change, fail and recover under
//! load.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::harness::client::request;
use crate::harness::dnsmasq::Dnsmasq;
use crate::harness::gateway::Watched;
use crate::harness::metrics::Scrape;
use crate::harness::{DEADLINE, Gateway, Origin, Setup, eventually};

/// Two origins with one port at two addresses of this machine.
fn pair() -> (Origin, Origin, u16) {
    eventually("a port that is free twice", || {
        let first = TcpListener::bind("127.0.0.1:0").ok()?;
        let port = first.local_addr().ok()?.port();
        let second = TcpListener::bind(("127.0.0.2", port)).ok()?;
        Some((Origin::named_on(first, "a"), Origin::named_on(second, "b"), port))
    })
}

/// A gateway whose upstream is the name `app.test` on this DNS server.
fn named(server: SocketAddr, port: u16, keys: &str) -> Setup {
    Setup::found(&format!("dns: {{ name: app.test, port: {port}, refresh: 200ms, servers: [\"{server}\"]{keys} }}"))
}

/// Sends requests in a loop while the story runs, and until the responses are as wanted; none may fail.
fn under_load(gateway: &Gateway, story: impl FnOnce(), wanted: &str) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut client = gateway.client();
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(client.get("/").status, 200);
                }
            });
        }
        let end = Over(&over);
        story();
        let mut client = gateway.client();
        eventually(&format!("answers of {wanted}, and of each"), || {
            let mut answers: Vec<String> = (0..8).map(|_| client.get("/").text().to_owned()).collect();
            answers.sort();
            answers.dedup();
            (answers.concat() == wanted).then_some(())
        });
        drop(end);
    });
}

/// Stops the load on drop, even after a panic.
struct Over<'o>(&'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn discoveries(outcome: &str) -> String {
    format!("forebay_upstream_discoveries_total{{upstream=\"app\",outcome=\"{outcome}\"}}")
}

/// Waits for one more of this outcome.
fn one_more(gateway: &Gateway, outcome: &str) {
    let before = Scrape::of(gateway.admin()).sum(&discoveries(outcome));
    gateway.wait_metric(&discoveries(outcome), |count| count > before);
}

#[test]
fn every_address_of_a_name_is_an_endpoint_and_when_it_changes_no_request_fails() {
    let (_a, _b, port) = pair();
    let dns = Dnsmasq::knowing("127.0.0.1 app.test");
    let gateway = named(dns.address(), port, "").start();
    assert_eq!(gateway.client().get("/").text(), "a");
    under_load(&gateway, || dns.tell("127.0.0.2 app.test"), "b");
    under_load(&gateway, || dns.tell("127.0.0.1 app.test\n127.0.0.2 app.test"), "ab");
    under_load(&gateway, || dns.tell("127.0.0.1 app.test"), "a");
    assert!(gateway.log_lines(6).iter().all(|line| line.text("endpoint") == format!("app.test:{port}")));
}

#[test]
fn an_endpoint_that_is_gone_ends_what_it_has_begun() {
    let (slow, dns) = (Origin::scripted(), Dnsmasq::knowing("127.0.0.1 app.test"));
    let gateway = named(dns.address(), slow.address().port(), "").start();
    let mut client = gateway.client();
    client.send(request("GET", "/", "", ""));
    let mut connection = slow.accept();
    connection.request();
    dns.tell("127.0.0.3 app.test");
    gateway.wait_metric("forebay_upstream_endpoints{upstream=\"app\",state=\"draining\"}", |count| count == 1.0);
    connection.answer("to the end");
    assert_eq!(client.response().text(), "to the end");
    gateway.wait_metric("forebay_upstream_endpoints{upstream=\"app\",state=\"draining\"}", |count| count == 0.0);
}

#[test]
fn while_nobody_tells_the_last_answer_holds() {
    let (_a, _b, port) = pair();
    let mut dns = Dnsmasq::knowing("127.0.0.1 app.test");
    let gateway = named(dns.address(), port, ", timeout: 300ms").start();
    let story = || {
        dns.kill();
        one_more(&gateway, "failed");
        assert_eq!(gateway.client().get("/").text(), "a");
        one_more(&gateway, "failed");
        dns.start_again("127.0.0.2 app.test");
    };
    under_load(&gateway, story, "b");
}

#[test]
fn a_name_that_is_gone_has_no_endpoints_after_a_while_and_comes_back() {
    let (_a, _b, port) = pair();
    let dns = Dnsmasq::knowing("127.0.0.1 app.test");
    let gateway = named(dns.address(), port, "").start();
    let status = || gateway.client().get("/").status;
    assert_eq!(status(), 200);
    dns.tell("127.0.0.1 other.test");
    eventually("no endpoint", || (status() == 503).then_some(()));
    assert!(Scrape::of(gateway.admin()).sum(&discoveries("none")) >= 2.0, "it was said more than once");
    assert_eq!(gateway.log_line_of_status(503).reason(), "select.no_endpoint");
    dns.tell("127.0.0.2 app.test");
    eventually("its return", || (status() == 200).then_some(()));
}

#[test]
fn a_name_that_is_not_there_yet_does_not_keep_the_gateway_from_starting() {
    let (_a, _b, port) = pair();
    let dns = Dnsmasq::knowing("");
    let gateway = named(dns.address(), port, "").start();
    let status = || gateway.client().get("/").status;
    assert_eq!(status(), 503);
    dns.tell("127.0.0.1 app.test");
    eventually("its first endpoint", || (status() == 200).then_some(()));
}

#[test]
fn a_name_without_addresses_is_as_good_as_none() {
    let dns = Dnsmasq::knowing("");
    let keys = format!("dns: {{ name: empty.test, port: 80, refresh: 100ms, servers: [\"{}\"] }}", dns.address());
    let gateway = Setup::found(&keys).start();
    assert_eq!(gateway.client().get("/").status, 503);
    gateway.wait_metric(&discoveries("none"), |count| count >= 2.0);
    assert_eq!(Scrape::of(gateway.admin()).sum(&discoveries("failed")), 0.0);
}

#[test]
fn a_server_that_never_answers_holds_nobody_up() {
    let silent = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let other = Origin::named("other");
    let routes = "{ name: other, match: { path: { exact: /other } }, upstream: other }\n{ name: all, upstream: app }";
    let started = Instant::now();
    let setup = named(silent.local_addr().expect("bound"), 80, ", timeout: 300ms").also("other", &other).routes(routes);
    let gateway = setup.start();
    assert!(started.elapsed() < DEADLINE);
    let mut client = gateway.client();
    one_more(&gateway, "failed");
    assert_eq!((client.get("/other").text(), client.get("/").status), ("other", 503));
}

#[test]
fn services_have_hosts_ports_weights_and_tiers() {
    let [a, b, c] = ["a", "b", "c"].map(Origin::named);
    let record =
        |origin: &Origin, rest: &str| format!("_web._tcp.app.test,host.test,{},{rest}", origin.address().port());
    let services = [record(&a, "10,3"), record(&b, "10,1"), record(&c, "20,1")];
    let services: Vec<&str> = services.iter().map(String::as_str).collect();
    let dns = Dnsmasq::serving("127.0.0.1 host.test", &services);
    let keys = format!("dns: {{ srv: _web._tcp.app.test, servers: [\"{}\"] }}", dns.address());
    let gateway = Setup::found(&keys).upstream("load_balancing: { policy: round_robin }").start();
    let mut client = gateway.client();
    let mut answers: Vec<String> = (0..8).map(|_| client.get("/").text().to_owned()).collect();
    answers.sort();
    assert_eq!(answers.concat(), "aaaaaabb", "the second tier is not needed");
}

#[test]
fn a_server_that_cannot_be_reached_over_ipv6_costs_no_failure() {
    let origin = Origin::named("over IPv4");
    let port = origin.address().port();
    assert!(TcpStream::connect((Ipv6Addr::LOCALHOST, port)).is_err(), "nobody listens there");
    let dns = Dnsmasq::knowing("127.0.0.1 app.test\n::1 app.test");
    let gateway = named(dns.address(), port, "").start();
    let mut client = gateway.client();
    for _ in 0..5 {
        assert_eq!(client.get("/").text(), "over IPv4");
    }
    assert!(gateway.log_lines(5).iter().all(|line| line.number("attempts") == 1.0));
    assert!(origin.connections() <= 2, "the way that works is kept: {}", origin.connections());
}

/// Replaces a list atomically.
fn rename_to(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).expect("a file of endpoints");
}

/// A gateway whose endpoints come from a file, which lists this one at first.
fn listed(first: &Origin) -> (Gateway, std::path::PathBuf) {
    let setup = Setup::found("");
    let path = setup.path("endpoints.yaml");
    rename_to(&path, &format!("- address: {}", first.address()));
    let keys = format!("file: {{ path: \"{}\", refresh: 200ms, max_size: 64KiB }}", path.display());
    (setup.upstream(&keys).start(), path)
}

#[test]
fn a_file_that_changes_changes_the_endpoints_and_no_request_fails() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let (gateway, path) = listed(&a);
    under_load(&gateway, || rename_to(&path, &format!("- address: {}", b.address())), "b");
    let both = format!("[ {{ address: {}, weight: 2 }}, {{ address: {} }} ]", a.address(), b.address());
    under_load(&gateway, || fs::write(&path, both).expect("a file"), "ab");
    under_load(&gateway, || rename_to(&path, &format!("- address: {}", a.address())), "a");
    let labels = gateway.log_lines(6);
    assert!(labels.iter().all(|line| line.text("endpoint") == path.display().to_string()));
}

#[test]
fn a_file_that_is_broken_gone_or_huge_changes_nothing() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let (gateway, path) = listed(&a);
    let mut client = gateway.client();
    let broken = [
        "",
        "- addres: 10.0.0.1:80",
        "- { address: 10.0.0.1:80",
        "endpoints: []",
        &"# long\n".repeat(10_000),
        &"[".repeat(60_000),
    ];
    for text in broken {
        rename_to(&path, text);
        one_more(&gateway, "failed");
        one_more(&gateway, "failed");
        assert_eq!(client.get("/").text(), "a", "{:?}", text.get(..20));
    }
    fs::remove_file(&path).expect("to remove it");
    one_more(&gateway, "failed");
    assert_eq!(client.get("/").text(), "a");
    rename_to(&path, &format!("- address: {}", b.address()));
    eventually("the new list", || (client.get("/").text() == "b").then_some(()));
    rename_to(&path, "[]");
    eventually("an empty list", || (client.get("/").status == 503).then_some(()));
}

#[test]
fn what_is_no_plain_file_is_not_waited_for_and_changes_nothing() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let (gateway, path) = listed(&a);
    let mut client = gateway.client();
    let [pipe, link] = ["pipe", "link"].map(|name| path.with_file_name(name));
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a named pipe");
    for to in [&*pipe, Path::new("/dev/zero"), Path::new("/")] {
        symlink(to, &link).and_then(|()| fs::rename(&link, &path)).expect("a link in place of the file");
        one_more(&gateway, "failed");
        one_more(&gateway, "failed");
        assert_eq!(client.get("/").text(), "a", "{to:?}");
    }
    rename_to(&path, &format!("- address: {}", b.address()));
    eventually("the new list", || (client.get("/").text() == "b").then_some(()));
}

#[test]
fn a_file_that_is_changed_by_turning_a_link_is_read_again() {
    let [a, b] = ["a", "b"].map(Origin::named);
    let (gateway, path) = listed(&a);
    let [one, two] = ["one", "two"].map(|name| path.with_file_name(name));
    fs::create_dir(&two).expect("a directory");
    fs::write(two.join("endpoints.yaml"), format!("- address: {}", b.address())).expect("a file");
    symlink(two.join("endpoints.yaml"), &one).expect("a link");
    fs::rename(&one, &path).expect("to put the link there");
    let mut client = gateway.client();
    eventually("what the link leads to", || (client.get("/").text() == "b").then_some(()));
}
