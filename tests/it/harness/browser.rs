//! A real browser: headless Chromium, controlled through the DevTools protocol.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};

use super::{DEADLINE, end, ms};

/// A browser with one page.
pub struct Browser {
    child: Child,
    socket: WebSocket<TcpStream>,
    calls: u64,
    page: String,
    /// Errors of the page: console errors, exceptions, blocked or missing resources.
    complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts a browser with an empty page.
    pub fn start() -> Browser {
        let profile = tempfile::tempdir().expect("a directory");
        let mut command = Command::new("chromium");
        command.args(["--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars"]);
        // Containers lack a large /dev/shm and user namespaces; all pages are our own.
        command.args(["--disable-dev-shm-usage", "--no-sandbox", "--remote-debugging-port=0"]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("chromium: conf/packaging/install-tools.sh test");
        let address = devtools(&mut child);
        let host = address.trim_start_matches("ws://").split('/').next().expect("an address").to_owned();
        let stream = TcpStream::connect(host).expect("the DevTools to answer");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let (socket, _) = tungstenite::client(address, stream).expect("a WebSocket");
        let (page, complaints) = (String::new(), Vec::new());
        let mut browser = Browser { child, socket, calls: 0, page, complaints, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", target);
        browser.page = attached["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Accepts any certificate.
    pub fn trust_anybody(&mut self) {
        self.call("Security.setIgnoreCertificateErrors", json!({ "ignore": true }));
    }

    /// Goes to an address.
    pub fn open(&mut self, address: &str) {
        let gone = self.call("Page.navigate", json!({ "url": address }));
        assert!(gone["errorText"].is_null(), "{address}: {gone}");
    }

    /// Sets the window size; `phone`: emulates a phone.
    pub fn window(&mut self, width: u32, height: u32, phone: bool) {
        let scale = if phone { 2 } else { 1 };
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }

    /// Sets the preferred colour scheme: `dark` or `light`.
    pub fn scheme(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// The result of this JavaScript on the page; `null` if it fails.
    pub fn eval(&mut self, script: &str) -> Value {
        let mut answer = self.call("Runtime.evaluate", evaluation(script));
        answer["result"]["value"].take()
    }

    /// The text of the first matching element; empty if there is none.
    pub fn text(&mut self, selector: &str) -> String {
        self.eval(&text_of(selector)).as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the text of an element satisfies `wanted`, and returns it.
    ///
    /// A page that is being left answers no script, so a failed script counts as an empty text.
    pub fn wait_text(&mut self, selector: &str, wanted: impl Fn(&str) -> bool) -> String {
        let script = text_of(selector);
        let mut last = json!(null);
        let started = Instant::now();
        while started.elapsed() < DEADLINE {
            last = match self.ask("Runtime.evaluate", evaluation(&script)) {
                Ok(mut answer) => answer["result"]["value"].take(),
                Err(error) => error,
            };
            if let Some(text) = last.as_str().filter(|text| wanted(text)) {
                return text.to_owned();
            }
            std::thread::park_timeout(ms(20));
        }
        panic!(
            "`{selector}` never became what was wanted; it says `{last}`, and the page complains: {:?}",
            self.complaints
        )
    }

    /// A PNG of the page: all of it, or the visible part.
    pub fn picture(&mut self, whole: bool) -> Vec<u8> {
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": whole }));
        STANDARD.decode(picture["data"].as_str().expect("a picture")).expect("base64")
    }

    /// The errors of the page so far.
    pub fn complaints(&mut self) -> Vec<String> {
        self.eval("1");
        std::mem::take(&mut self.complaints)
    }

    /// The result of this method, which has to succeed.
    fn call(&mut self, method: &str, arguments: Value) -> Value {
        self.ask(method, arguments).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// The result of this method, or the error that the browser reports.
    fn ask(&mut self, method: &str, arguments: Value) -> Result<Value, Value> {
        self.calls += 1;
        let id = self.calls;
        let mut call = json!({ "id": id, "method": method, "params": arguments });
        if !self.page.is_empty() {
            call["sessionId"] = json!(self.page);
        }
        self.socket.send(Message::text(call.to_string())).expect("the browser to listen");
        loop {
            let mut message = match self.socket.read() {
                Ok(Message::Text(text)) => serde_json::from_str::<Value>(&text).expect("JSON"),
                Ok(_) => continue,
                Err(error) => panic!("{method}: the browser does not answer: {error}"),
            };
            if message["id"] == json!(id) {
                return match message["error"].take() {
                    Value::Null => Ok(message["result"].take()),
                    error => Err(error),
                };
            }
            self.complaints.extend(complaint(&message));
        }
    }
}

/// A script that returns the text of the first element that matches; empty if there is none.
fn text_of(selector: &str) -> String {
    format!("(document.querySelector({selector:?}) || {{ textContent: '' }}).textContent")
}

/// The arguments of `Runtime.evaluate`.
fn evaluation(script: &str) -> Value {
    json!({ "expression": script, "returnByValue": true })
}

/// The error in this event.
fn complaint(event: &Value) -> Option<String> {
    let of = &event["params"];
    match event["method"].as_str()? {
        "Runtime.consoleAPICalled" if of["type"] == "error" || of["type"] == "warning" => Some(of["args"].to_string()),
        "Runtime.exceptionThrown" => Some(of["exceptionDetails"].to_string()),
        "Log.entryAdded" if of["entry"]["level"] == "error" => {
            Some(format!("{} {}", of["entry"]["text"], of["entry"]["url"]))
        }
        _ => None,
    }
}

/// The DevTools address from standard error: `DevTools listening on ws://…`.
fn devtools(child: &mut Child) -> String {
    let stderr = BufReader::new(child.stderr.take().expect("its standard error"));
    let (said, heard) = mpsc::channel();
    // Read to its end, so that the browser never blocks on it.
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            if let Some(address) = line.strip_prefix("DevTools listening on ") {
                let _ = said.send(address.to_owned());
            }
        }
    });
    // It is a large program and starts several processes.
    heard.recv_timeout(4 * DEADLINE).expect("the browser to start")
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its child processes end when it is asked to close, or when it is gone.
        let close = json!({ "id": 0, "method": "Browser.close" });
        if self.socket.send(Message::text(close.to_string())).is_ok() {
            let asked = Instant::now();
            while asked.elapsed() < ms(3000) && matches!(self.child.try_wait(), Ok(None)) {
                std::thread::park_timeout(ms(20));
            }
        }
        end(&mut self.child);
    }
}
