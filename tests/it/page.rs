//! The status page in a real browser: it updates live, reconnects by itself, and fits a phone.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, io, thread};

use crate::harness::browser::Browser;
use crate::harness::client::{get, request};
use crate::harness::origin::{Closed, built_in};
use crate::harness::{Client, Gateway, Origin, Setup, ms};

/// Opens the page and waits until it is live.
fn look(browser: &mut Browser, at: SocketAddr) {
    browser.open(&format!("http://{at}/"));
    browser.wait_text("#live", |live| live == "live");
}

fn upload(gateway: &Gateway, path: &str) -> Client {
    let mut client = gateway.client();
    client.send(format!("POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf"));
    client
}

#[test]
fn the_page_shows_what_happens_while_it_happens() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut browser = Browser::start();
    look(&mut browser, gateway.admin());
    assert_eq!(browser.text("#phases [data-key=buffer] .count"), "0");
    let mut client = upload(&gateway, "/slow");
    browser.wait_text("#phases [data-key=buffer] .count", |count| count == "1");
    browser.wait_text("#slow td:last-child", |target| target == "POST /slow");
    client.send("body");
    assert_eq!(client.response().status, 200);
    get(gateway.web(), "/");
    browser.wait_text("#phases [data-key=buffer] .count", |count| count == "0");
    browser.wait_text("#routes [data-key=all] td:last-child", |count| count == "2");
    browser.wait_text("#upstreams tbody th", |endpoint| endpoint == origin.address().to_string());
    browser.wait_text("#workers .with > span", |busy| busy.ends_with('%'));
    assert_eq!(browser.text("#state"), "ready");
    assert_eq!(browser.complaints(), [""; 0]);
}

/// Like `ssh -L`: forwards connections from its own address while it is open.
struct Tunnel {
    address: SocketAddr,
    open: Arc<AtomicBool>,
}

impl Tunnel {
    fn to(admin: SocketAddr) -> Tunnel {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let (address, open) = (listener.local_addr().expect("its address"), Arc::new(AtomicBool::new(true)));
        let passing = open.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten().filter(|_| passing.load(Ordering::Relaxed)) {
                let server = TcpStream::connect(admin).expect("the admin endpoint");
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
                    let passing = passing.clone();
                    thread::spawn(move || pass(from, to, &passing));
                }
            }
        });
        Tunnel { address, open }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, open: &AtomicBool) {
    from.set_read_timeout(Some(ms(20))).expect("a timeout");
    let mut piece = [0; 16 << 10];
    while open.load(Ordering::Relaxed) {
        match io::Read::read(&mut from, &mut piece) {
            Ok(0) => break,
            Ok(read) if io::Write::write_all(&mut to, &piece[..read]).is_err() => break,
            Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => break,
            _ => {}
        }
    }
    let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
}

#[test]
fn a_page_that_came_through_a_tunnel_says_when_it_breaks_and_comes_back() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let tunnel = Tunnel::to(gateway.admin());
    let mut browser = Browser::start();
    look(&mut browser, tunnel.address);
    tunnel.open.store(false, Ordering::Relaxed);
    browser.wait_text("#live", |live| live.starts_with("no answer"));
    get(gateway.web(), "/");
    tunnel.open.store(true, Ordering::Relaxed);
    browser.wait_text("#live", |live| live == "live");
    browser.wait_text("#routes [data-key=all] td:last-child", |count| count == "1");
}

#[test]
fn a_page_without_a_free_stream_waits_for_one() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).admin("streams: 1").start();
    let mut first = Client::connect(gateway.admin());
    first.send(request("GET", "/status/events", "", ""));
    first.bytes(16);
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/status", gateway.admin()));
    browser.wait_text("#live", |live| live.starts_with("no answer"));
    drop(first);
    browser.wait_text("#live", |live| live == "live");
}

#[test]
fn the_page_fits_a_phone_and_stands_still_when_told_to() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let mut browser = Browser::start();
    browser.window(390, 844, true);
    look(&mut browser, gateway.admin());
    let _client = upload(&gateway, "/a/path/that/is/rather/long/for/a/phone/but/not/for/a/desk");
    browser.wait_text("#slow td:last-child", |target| target.starts_with("POST /a"));
    assert_eq!(browser.eval("document.documentElement.scrollWidth"), 390);
    browser.eval("document.querySelector('#pause').click()");
    let shown = browser.eval("document.body.dataset.shown");
    get(gateway.web(), "/");
    browser.eval("window.came = 0; source.addEventListener('status', () => window.came++)");
    browser.wait_text("#live", |live| live == "paused");
    crate::harness::eventually("two events", || (browser.eval("window.came").as_u64() >= Some(2)).then_some(()));
    assert_eq!(browser.eval("document.body.dataset.shown"), shown);
    browser.eval("document.querySelector('#pause').click()");
    let goes_on = "document.body.dataset.shown";
    crate::harness::eventually("the page to go on", || (browser.eval(goes_on) != shown).then_some(()));
    assert_eq!(browser.complaints(), [""; 0]);
}

#[test]
fn what_clients_say_is_text_on_the_page_and_the_page_may_do_nothing_else() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let _client = upload(&gateway, "/'\"&lt;img+onerror=x");
    let mut browser = Browser::start();
    look(&mut browser, gateway.admin());
    browser.wait_text("#slow td:last-child", |target| target == "POST /'%22&lt;img+onerror=x");
    // Scripts that the policy does not list by digest do not run.
    browser.eval(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))",
    );
    assert_eq!(browser.eval("window.ran"), serde_json::Value::Null);
    let complaints = browser.complaints();
    assert!(complaints.iter().all(|complaint| complaint.contains("Content Security Policy")), "{complaints:?}");
    assert!(!complaints.is_empty());
}

#[test]
fn only_a_browser_gets_the_page() {
    let origin = Origin::named("origin");
    let gateway = Setup::before(&origin).start();
    let ask = |path: &str, accept: &str| {
        let fields = format!("Accept: {accept}\r\n");
        let answer = Client::connect(gateway.admin()).ask("GET", path, &fields, "");
        let value = |name| answer.head.value(name).unwrap_or_default().to_owned();
        (answer.status, value("content-type"), value("content-security-policy"))
    };
    const BROWSER: &str = "text/html,application/xhtml+xml,*/*;q=0.8";
    for path in ["/", "/status"] {
        let (status, kind, policy) = ask(path, BROWSER);
        assert_eq!((status, &*kind), (200, "text/html; charset=utf-8"), "{path}");
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
    }
    assert_eq!(ask("/", "*/*").1, "text/plain; charset=utf-8");
    assert_eq!(ask("/status", "*/*").1, "application/json");
    assert_eq!(ask("/status?format=json", BROWSER).1, "application/json");
}

/// The least contrast of any text with its background (WCAG 2.2, 1.4.3), and that text.
const CONTRAST: &str = r#"(() => {
  const part = (colour, i) => { const c = colour.match(/[\d.]+/g).map(Number); return c[3] === 0 ? null : c[i] / 255; };
  const light = colour => [.2126, .7152, .0722].reduce((sum, weight, i) => {
    const c = part(colour, i); return sum + weight * (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); }, 0);
  const behind = node => { for (; node; node = node.parentElement) { const c = getComputedStyle(node).backgroundColor;
    if (part(c, 0) !== null) return c; } return 'rgb(255, 255, 255)'; };
  let least = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    if (!node.getClientRects().length || ![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < least[0]) least = [contrast, node.textContent];
  }
  return least;
})()"#;

#[test]
fn every_word_is_readable_in_the_dark_and_in_the_light() {
    let (origin, closed) = (Origin::named("origin"), Closed::refusing());
    let gateway = Setup::before_all(&[origin.address(), closed.address()]).start();
    let mut browser = Browser::start();
    browser.window(1280, 900, false);
    look(&mut browser, gateway.admin());
    let _client = upload(&gateway, "/half");
    (0..4).for_each(|_| drop(get(gateway.web(), "/")));
    Client::connect(gateway.web()).ask("GET", "/", "Host: twice\r\n", "");
    browser.wait_text("#refusals th", |reason| reason == "header.host");
    browser.wait_text("#slow td:last-child", |target| target == "POST /half");
    let mut grounds = Vec::new();
    for scheme in ["dark", "light"] {
        browser.scheme(scheme);
        let least = browser.eval(CONTRAST);
        assert!(least[0].as_f64() >= Some(4.5), "{scheme}: {least}");
        grounds.push(browser.eval("getComputedStyle(document.documentElement).backgroundColor"));
    }
    assert_ne!(grounds[0], grounds[1]);
}

/// `UPDATE_PICTURES=1` takes the pictures again, from a gateway with all kinds of trouble.
#[test]
fn the_manual_shows_the_page() {
    const PICTURES: [(&str, &str, (u32, u32, bool)); 3] = [
        ("status-light.png", "light", (1280, 900, false)),
        ("status-dark.png", "dark", (1280, 900, false)),
        ("status-phone.png", "dark", (390, 844, true)),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/manual/pictures");
    if std::env::var_os("UPDATE_PICTURES").is_some() {
        of_a_busy_gateway(|browser| {
            for (name, scheme, (width, height, phone)) in PICTURES {
                browser.scheme(scheme);
                browser.window(width, height, phone);
                fs::write(folder.join(name), browser.picture(!phone)).expect("a picture");
            }
        });
    }
    let manual = fs::read_to_string(folder.join("../status.md")).expect("the manual");
    for (name, ..) in PICTURES {
        let picture = fs::read(folder.join(name)).expect("a picture");
        assert!(picture.starts_with(b"\x89PNG") && picture.len() < 400_000, "{name}: {}", picture.len());
        assert!(manual.contains(&format!("](pictures/{name})")), "conf/manual/status.md does not show {name}");
    }
}

/// Shows a browser the page of a gateway with fast and slow clients, failures and refusals, once its charts have
/// data.
fn of_a_busy_gateway(picture: impl FnOnce(&mut Browser)) {
    let (origin, closed, over) = (built_in(), Closed::refusing(), AtomicBool::new(false));
    let routes = "{ name: shop, match: { path: { prefix: /delay } }, upstream: app }\n\
                  { name: uploads, match: { path: { prefix: /echo } }, upstream: app }\n\
                  { name: video, match: { path: { prefix: /bytes } }, upstream: media }\n\
                  { name: legacy, match: { path: { prefix: /status } }, upstream: app }\n\
                  { name: moved, match: { path: { prefix: /old } }, filters: [ { redirect: { to: \"/new\" } } ] }";
    let setup = Setup::before_all(&[origin.address(), closed.address()]).also_at("media", origin.address());
    let setup = setup.upstream("health_check: { tcp: {}, interval: 1s }");
    let gateway = setup.routes(routes).server("threads: 2").start();
    let ask = |paths: &[&str], pause: u64| {
        for path in paths.iter().cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
            get(gateway.web(), path);
            thread::sleep(ms(pause));
        }
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| ask(&["/delay/3ms", "/delay/8ms", "/delay/21ms"], 10));
            scope.spawn(|| ask(&["/bytes/64KiB", "/bytes/8KiB"], 30));
        }
        scope.spawn(|| ask(&["/status/200", "/status/404", "/status/200", "/status/503", "/old", "/nowhere"], 60));
        scope.spawn(|| ask(&["/delay/4s"], 0));
        let mut browser = Browser::start();
        browser.window(1280, 900, false);
        look(&mut browser, gateway.admin());
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let uploads = (0..5).map(|n| upload(&gateway, &format!("/echo/holiday-{n}.mov")));
                let _uploads: Vec<Client> = uploads.collect();
                (0..120).take_while(|_| !over.load(Ordering::Relaxed)).for_each(|_| thread::sleep(ms(100)));
            }
        });
        let readers = (0..6).map(|_| {
            let mut client = Client::slow(gateway.web());
            client.send(request("GET", "/bytes/3MiB", "", ""));
            client
        });
        let _readers: Vec<Client> = readers.collect();
        while browser.eval("Number(document.body.dataset.shown)").as_u64() < Some(45) {
            thread::sleep(ms(500));
        }
        picture(&mut browser);
        over.store(true, Ordering::Relaxed);
    });
}
