//! What bad clients do, each on a connection of its own and for a few seconds at most.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use socket2::{Domain, SockRef, Socket, Type};

use super::super::frames::{
    self, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame,
};
use crate::harness::client::{chunked, request};

/// Where they come to, and how long they go on.
#[derive(Clone, Copy)]
pub struct Scene {
    pub web: SocketAddr,
    pub until: Instant,
}

type Habit = fn(&Scene, &mut StdRng);

/// Each habit and its name.
pub const HABITS: &[(&str, Habit)] = &[
    ("connects and says nothing", |scene, _| scene.meet(|peer| peer.hear_out())),
    ("connects and leaves at once", |scene, dice| scene.meet(|peer| peer.leave(dice))),
    ("sends half a header", |scene, _| {
        scene.meet(|peer| peer.say("GET / HTTP/1.1\r\nHost: te") && peer.hear_out());
    }),
    ("sends a header byte by byte", |scene, dice| {
        scene.meet(|peer| peer.drip(&request("GET", "/", "X: a header of some length\r\n", ""), dice));
    }),
    ("sends a huge header", |scene, dice| {
        let field = format!("X: {}\r\n", "y".repeat(dice.gen_range(1_000..100_000)));
        scene.meet(|peer| peer.say(request("GET", "/", &field.repeat(dice.gen_range(1..20)), "")) && peer.hear_out());
    }),
    ("sends what is no header", |scene, dice| {
        let bytes: Vec<u8> = (0..dice.gen_range(1..2_000)).map(|_| dice.r#gen()).collect();
        scene.meet(|peer| peer.say(bytes) && peer.hear_out());
    }),
    ("sends a body byte by byte", |scene, dice| {
        scene.meet(|peer| {
            let _ = peer.say("POST /headers HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n")
                && peer.drip(&[b'x'; 1_000], dice);
        });
    }),
    ("stops in the middle of a body", |scene, dice| {
        scene.meet(|peer| {
            let body = vec![b'x'; dice.gen_range(0..1 << 20)];
            let head = "PUT /headers HTTP/1.1\r\nHost: test\r\nContent-Length: 2000000\r\n\r\n";
            let _ = peer.say(head) && peer.say(body) && peer.hear_out();
        });
    }),
    ("leaves in the middle of a body", |scene, dice| {
        scene.meet(|peer| {
            let body = vec![b'x'; dice.gen_range(0..1 << 20)];
            let _ =
                peer.say("PUT /headers HTTP/1.1\r\nHost: test\r\nContent-Length: 2000000\r\n\r\n") && peer.say(body);
            peer.leave(dice);
        });
    }),
    ("sends bad chunks", |scene, dice| {
        scene.meet(|peer| {
            let mut body = chunked(&vec![b'x'; dice.gen_range(1..100_000)], 1_000);
            let at = dice.gen_range(0..body.len());
            body[at] = dice.r#gen();
            let _ = peer.say("POST /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
                && peer.say(body)
                && peer.hear_out();
        });
    }),
    ("reads slowly", |scene, dice| {
        scene.meet_narrow(|peer| {
            peer.say(request("GET", "/bytes/1MiB", "", "")) && peer.sip(dice.gen_range(100..4_000))
        });
    }),
    ("reads nothing", |scene, dice| {
        scene.meet_narrow(|peer| {
            let _ = peer.say(request("GET", "/chunked/4MiB", "", ""));
            peer.idle(dice);
            peer.leave(dice);
        });
    }),
    ("asks many things at once and closes its side", |scene, dice| {
        scene.meet(|peer| {
            let _ = peer.say(request("GET", "/bytes/1000", "", "").repeat(dice.gen_range(1..50)));
            peer.close_side();
            peer.hear_out();
        });
    }),
    ("asks and keeps the connection for nothing", |scene, _| {
        scene.meet(|peer| peer.say(request("GET", "/bytes/10", "", "")) && peer.hear_out());
    }),
    ("asks a backend that fails", |scene, dice| {
        const FAULTS: &[&str] =
            &["close", "reset", "reset/10", "hang", "early", "garbage", "half", "half-chunked", "stall", "slow-header"];
        let fault = format!("/fault/{}", FAULTS[dice.gen_range(0..FAULTS.len())]);
        scene.meet(|peer| peer.say(request("POST", &fault, "", "some body")) && peer.hear_out());
    }),
    ("announces another protocol and speaks none", |scene, dice| {
        scene.meet(|peer| {
            let _ = peer.say(request("GET", "/bytes/10", "Connection: Upgrade\r\nUpgrade: websocket\r\n", ""));
            peer.idle(dice);
            peer.leave(dice);
        });
    }),
    ("waits for 100 and then sends nothing", |scene, _| {
        let head = "PUT /headers HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n";
        scene.meet(|peer| peer.say(head) && peer.hear_out());
    }),
    ("opens streams and resets them at once", |scene, dice| {
        scene.meet_h2(&[], |peer| {
            let mut frames = Vec::new();
            for stream in (1..400).step_by(2) {
                frames.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/bytes/100000")));
                frames.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            }
            let _ = peer.say(frames);
            peer.idle(dice);
        });
    }),
    ("grants a window of one byte", |scene, dice| {
        scene.meet_h2(&setting(4, 1), |peer| {
            let _ = peer.say(frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/bytes/1MiB")));
            for _ in 0..dice.gen_range(0..30) {
                peer.sip_for(Duration::from_millis(50));
                if !peer.say(frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])) {
                    break;
                }
            }
            peer.leave(dice);
        });
    }),
    ("opens more streams than it may and lets them lie", |scene, dice| {
        scene.meet_h2(&setting(4, 0), |peer| {
            let open = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/bytes/100KiB"));
            let _ = peer.say((1..60).step_by(2).flat_map(open).collect::<Vec<u8>>());
            peer.idle(dice);
            peer.leave(dice);
        });
    }),
    ("sends a body on a stream and stops", |scene, dice| {
        scene.meet_h2(&[], |peer| {
            let _ = peer.say(frame(HEADERS, END_HEADERS, 1, &frames::request("POST", "/echo")))
                && peer.say(frame(DATA, 0, 1, &vec![b'x'; dice.gen_range(0..16_384)]));
            peer.idle(dice);
            peer.leave(dice);
        });
    }),
    ("never ends a header block", |scene, dice| {
        scene.meet_h2(&[], |peer| {
            let _ = peer.say(frame(HEADERS, 0, 1, &get("/")));
            for _ in 0..dice.gen_range(0..200) {
                if !peer.say(frame(frames::CONTINUATION, 0, 1, &frames::field("x", "y"))) {
                    break;
                }
            }
            peer.hear_out();
        });
    }),
    ("pings without end", |scene, dice| {
        scene.meet_h2(&[], |peer| {
            peer.say(frame(PING, 0, 0, &[0; 8]).repeat(dice.gen_range(1..5_000))) && peer.hear_out()
        });
    }),
    ("sends frames of any kind", |scene, dice| {
        let bytes = frames::connection(dice);
        scene.meet(|peer| peer.say(bytes) && peer.hear_out());
    }),
];

/// The header block of a GET.
fn get(path: &str) -> Vec<u8> {
    frames::request("GET", path)
}

fn setting(identifier: u8, value: u8) -> [u8; 6] {
    [0, identifier, 0, 0, 0, value]
}

impl Scene {
    /// Connects, and lets a client do what it does, as long as the mix goes on and for three seconds at most.
    fn meet<T>(&self, act: impl FnOnce(&mut Peer) -> T) {
        self.meet_with(None, act);
    }

    /// The same with the smallest receive buffer there is.
    fn meet_narrow<T>(&self, act: impl FnOnce(&mut Peer) -> T) {
        self.meet_with(Some(1), act);
    }

    fn meet_h2<T>(&self, settings: &[u8], act: impl FnOnce(&mut Peer) -> T) {
        self.meet(|peer| {
            if peer.say([frames::PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()) {
                act(peer);
            }
        });
    }

    fn meet_with<T>(&self, receive_buffer: Option<usize>, act: impl FnOnce(&mut Peer) -> T) {
        let socket = Socket::new(Domain::for_address(self.web), Type::STREAM, None).expect("a socket");
        if let Some(size) = receive_buffer {
            socket.set_recv_buffer_size(size).expect("a small buffer");
        }
        // A machine that is busy may not get to it in time: then this client did not come.
        if socket.connect_timeout(&self.web.into(), Duration::from_secs(5)).is_err() {
            return;
        }
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a read timeout");
        stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a write timeout");
        let until = self.until.min(Instant::now() + Duration::from_secs(3));
        act(&mut Peer { stream, until });
    }
}

/// A client on one connection. Whatever it does may come to nothing: it is in the wrong.
struct Peer {
    stream: TcpStream,
    until: Instant,
}

impl Peer {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// Sends it all, if the gateway takes it.
    fn say(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Sends one byte after the other.
    fn drip(&mut self, bytes: &[u8], dice: &mut StdRng) -> bool {
        bytes.iter().all(|byte| {
            thread::sleep(Duration::from_millis(dice.gen_range(10..200)));
            self.goes_on() && self.say([*byte])
        })
    }

    /// Reads what comes, until the gateway ends the connection or it is time to go. Whether the gateway did.
    fn hear_out(&mut self) -> bool {
        while self.goes_on() {
            match self.stream.read(&mut [0; 16 * 1024]) {
                Ok(0) => return true,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return true,
                _ => {}
            }
        }
        false
    }

    /// Reads so many bytes, and pauses, and again.
    fn sip(&mut self, bytes: usize) -> bool {
        let mut piece = vec![0; bytes];
        while self.goes_on() {
            thread::sleep(Duration::from_millis(20));
            match self.stream.read(&mut piece) {
                Ok(0) => return true,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return true,
                _ => {}
            }
        }
        false
    }

    fn sip_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && self.stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {}
    }

    /// Does nothing for a while.
    fn idle(&self, dice: &mut StdRng) {
        let pause = Duration::from_millis(dice.gen_range(0..2_000));
        thread::sleep(pause.min(self.until.saturating_duration_since(Instant::now())));
    }

    fn close_side(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Closes or resets, as it comes.
    fn leave(&mut self, dice: &mut StdRng) {
        if dice.r#gen() {
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}
