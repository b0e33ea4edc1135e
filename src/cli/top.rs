//! `forebay top`: live status of a running gateway on a terminal.
//!
//! A thread polls `/status`; this thread draws the results and handles keys, so that a slow gateway does not block
//! the keyboard. [`sheet`] builds the content without a terminal; [`view`] draws it.

mod history;
mod sheet;
mod view;

use std::io::{self, IsTerminal};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::Failure;
use super::admin::{AdminEndpoint, Where};
use crate::admin::status::Document;
use crate::gateway::Builder;
use history::History;
use sheet::Topic;

/// More than fits on a screen, but not thousands of routes every second.
const TARGET: &str = "/status?routes=300&slow=200&endpoints=100";

/// How long a key press may wait for its effect.
const TICK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct Top {
    #[command(flatten)]
    place: Where,
    /// The polling interval, from 100ms to 1h
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let range = Duration::from_millis(100)..=Duration::from_secs(3_600);
    if range.contains(&time) { Ok(time) } else { Err("from 100ms to 1h".to_owned()) }
}

/// Runs until the user quits. If the gateway does not respond at all, it fails before it touches the terminal.
pub fn top(builder: &Builder, Top { place, interval }: Top) -> Result<(), Failure> {
    let endpoint = place.find(builder)?;
    if !io::stdout().is_terminal() {
        let address = &endpoint.address;
        return Err(Failure::Usage(format!(
            "`forebay top` needs a terminal; for a script, ask the admin endpoint at {address} for /status"
        )));
    }
    let first = ask(&endpoint).map_err(Failure::Runtime)?;
    let mut screen = Screen::new(endpoint.address.clone());
    screen.take(Ok(first));
    // Capacity one: no new request is sent before the last result is drawn.
    let (send, looks) = sync_channel(1);
    let asks = thread::Builder::new().name("status".to_owned());
    asks.spawn(move || look(&endpoint, interval, &send)).map_err(Failure::io("start a thread"))?;
    let mut terminal = ratatui::try_init().map_err(Failure::io("use the terminal"))?;
    let done = show(&mut terminal, &mut screen, &looks);
    ratatui::restore();
    done.map_err(Failure::io("draw on the terminal"))
}

fn ask(endpoint: &AdminEndpoint) -> Result<Document, String> {
    let body = endpoint.get(TARGET)?;
    serde_json::from_slice(&body).map_err(|error| format!("{} did not return a status: {error}", endpoint.address))
}

fn look(endpoint: &AdminEndpoint, interval: Duration, looks: &SyncSender<Result<Document, String>>) {
    loop {
        thread::sleep(interval);
        if looks.send(ask(endpoint)).is_err() {
            return;
        }
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    screen: &mut Screen,
    looks: &Receiver<Result<Document, String>>,
) -> io::Result<()> {
    loop {
        terminal.draw(|frame| view::draw(frame, screen))?;
        let drawn = Instant::now();
        // Until an event requires a redraw.
        loop {
            if event::poll(TICK)? {
                match event::read()? {
                    Event::Key(key) if key.kind != KeyEventKind::Release => match screen.obey(key) {
                        Obeyed::Quit => return Ok(()),
                        Obeyed::Changed => break,
                        Obeyed::Nothing => {}
                    },
                    Event::Resize(..) => break,
                    _ => {}
                }
            }
            match looks.recv_timeout(Duration::ZERO) {
                Ok(came) => {
                    screen.take(came);
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if drawn.elapsed() > Duration::from_secs(1) && screen.trouble.is_some() {
                break;
            }
        }
    }
}

/// The state of the screen.
pub struct Screen {
    /// The address of the gateway.
    address: String,
    history: History,
    topic: Topic,
    /// The sort column of each topic; `None`: the order of the gateway.
    sorted: [Option<usize>; Topic::ALL.len()],
    /// Ascending order.
    reversed: bool,
    /// Number of rows above the window.
    above: usize,
    paused: bool,
    help: bool,
    /// The last error, if the last request failed, and when the errors began.
    trouble: Option<(String, Instant)>,
}

enum Obeyed {
    Nothing,
    Changed,
    Quit,
}

impl Screen {
    fn new(address: String) -> Self {
        Screen {
            address,
            history: History::default(),
            topic: Topic::Loop,
            sorted: [None; Topic::ALL.len()],
            reversed: false,
            above: 0,
            paused: false,
            help: false,
            trouble: None,
        }
    }

    fn take(&mut self, came: Result<Document, String>) {
        match came {
            Ok(document) => {
                self.trouble = None;
                if !self.paused {
                    self.history.push(document);
                }
            }
            Err(why) => {
                let since = self.trouble.take().map_or_else(Instant::now, |(_, since)| since);
                self.trouble = Some((why, since));
            }
        }
    }

    fn obey(&mut self, key: KeyEvent) -> Obeyed {
        if self.help {
            self.help = false;
            return Obeyed::Changed;
        }
        let place = self.topic as usize;
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Obeyed::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return Obeyed::Quit,
            KeyCode::Char(digit @ '1'..='4') => self.turn_to(digit as usize - '1' as usize),
            KeyCode::Tab | KeyCode::Right => self.turn_to(place + 1),
            KeyCode::BackTab | KeyCode::Left => self.turn_to(place + Topic::ALL.len() - 1),
            KeyCode::Char('s') => {
                let columns = sheet::of(self.topic, &self.history).columns.len();
                self.sorted[place] =
                    Some(self.sorted[place].map_or(0, |column| column + 1)).filter(|&next| next < columns);
            }
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('?' | 'h') => self.help = true,
            KeyCode::Up | KeyCode::Char('k') => self.above = self.above.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.above += 1,
            KeyCode::PageUp => self.above = self.above.saturating_sub(10),
            KeyCode::PageDown => self.above += 10,
            KeyCode::Home => self.above = 0,
            _ => return Obeyed::Nothing,
        }
        Obeyed::Changed
    }

    fn turn_to(&mut self, place: usize) {
        self.topic = Topic::ALL[place % Topic::ALL.len()];
        self.above = 0;
    }
}
