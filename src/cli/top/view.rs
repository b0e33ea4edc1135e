//! Draws `forebay top`: a header, the tabs, the phases if there is space, one table, and the keys.

use std::iter;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Row, Table};

use super::super::figures::{bytes, number, or_dash, time};
use super::sheet::{Sheet, Tone, Topic};
use super::{Screen, sheet};
use crate::admin::status::{Document, PhaseStatus};
use crate::printable::printable;

/// The phases are hidden on terminals with fewer lines.
const HEIGHT_FOR_PHASES: u16 = 14;

const KEYS: &str = "1-4 tab: view  s: sort  r: reverse  p: pause  j k: scroll  ?: help  q: quit";

const HELP: &str = "\
1 2 3 4   loop, routes, upstreams, slow clients
tab       the next one; shift-tab: the one before
s         sort by the next column, at the end as the gateway lists them
r         the other way round
p, space  stand still, and go on
j k ↓ ↑   scroll; page up, page down, home
q, esc    quit

Rates are those of the last 5 seconds, percentiles of the last 30.
Blue is the client's side, magenta the backend's, green is Forebay itself
and what goes well; yellow is worth a look, red is broken.";

fn style(tone: Tone) -> Style {
    let colour = match tone {
        Tone::Plain => return Style::new(),
        Tone::Faint => return Style::new().add_modifier(Modifier::DIM),
        Tone::Client => Color::Blue,
        Tone::Backend => Color::Magenta,
        Tone::Own => Color::Green,
        Tone::Warn => Color::Yellow,
        Tone::Bad => Color::Red,
    };
    Style::new().fg(colour)
}

/// Draws the whole screen.
pub fn draw(frame: &mut Frame, screen: &mut Screen) {
    let phases = screen.topic == Topic::Loop && frame.area().height >= HEIGHT_FOR_PHASES;
    let rows = [1, 1, if phases { 5 } else { 0 }].map(Constraint::Length);
    let rows = rows.into_iter().chain([Constraint::Min(0), Constraint::Length(1)]);
    let [head, tabs, flow, table, foot] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(Paragraph::new(summary(screen)), head);
    frame.render_widget(Paragraph::new(titles(screen)), tabs);
    if let Some(last) = screen.history.last().filter(|_| phases) {
        draw_phases(frame, flow, &last.phases);
    }
    if screen.help {
        frame.render_widget(Paragraph::new(HELP), table);
    } else {
        draw_sheet(frame, table, screen);
    }
    frame.render_widget(Paragraph::new(last_line(screen)), foot);
}

fn summary(screen: &Screen) -> Line<'static> {
    let Some(last) = screen.history.last() else { return Line::raw(screen.address.clone()) };
    let state = if last.state == "ready" { Tone::Own } else { Tone::Warn };
    let requests =
        screen.history.rate(|document| Some(document.routes.iter().map(|route| route.exchanges as f64).sum()));
    let failed = screen.history.rate(|document| Some(sum_of(document, "5xx")));
    let p99 = screen.history.quantile(&last.bounds.exchange_seconds, 0.99, |document| Some(merged(document)));
    let held = &last.spools;
    let held =
        held.memory.request_bytes + held.memory.response_bytes + held.disk.request_bytes + held.disk.response_bytes;
    let mut spans = vec![
        Span::styled("Forebay ", Style::new().add_modifier(Modifier::BOLD)),
        Span::styled(last.state.clone(), style(state)),
        Span::raw(format!(
            "  {} req/s  p99 {}  slow {}  held {}",
            or_dash(requests, number),
            or_dash(p99, time),
            last.slow_clients.request + last.slow_clients.response,
            bytes(held as f64)
        )),
    ];
    if let Some(failed) = failed.filter(|&failed| failed > 0.0) {
        spans.push(Span::styled(format!("  5xx {}/s", number(failed)), style(Tone::Bad)));
    }
    if last.stalled_workers > 0 {
        spans.push(Span::styled(format!("  {} stalled", last.stalled_workers), style(Tone::Bad)));
    }
    let short = format!("  up {}  configuration {}  {}", time(last.uptime_seconds), last.generation, screen.address);
    spans.push(Span::styled(short, style(Tone::Faint)));
    Line::from(spans)
}

fn sum_of(document: &Document, class: &str) -> f64 {
    document.routes.iter().map(|route| route.codes.get(class).copied().unwrap_or(0) as f64).sum()
}

/// The sum of the histograms of all routes.
fn merged(document: &Document) -> Vec<u64> {
    let mut all = vec![0; document.bounds.exchange_seconds.len() + 1];
    for route in &document.routes {
        all.iter_mut().zip(&route.seconds.buckets).for_each(|(all, count)| *all += count);
    }
    all
}

fn titles(screen: &Screen) -> Line<'static> {
    let tabs = Topic::ALL.into_iter().enumerate().map(|(place, topic)| {
        let chosen = topic == screen.topic;
        let style = if chosen { Style::new().add_modifier(Modifier::REVERSED) } else { style(Tone::Faint) };
        Span::styled(format!(" {} {} ", place + 1, topic.title()), style)
    });
    let paused = screen.paused.then(|| Span::styled("  paused", style(Tone::Warn)));
    tabs.chain(paused).collect()
}

/// The side that a phase waits for.
fn side(phase: &str) -> Tone {
    match phase {
        "accept" | "handshake" | "header" | "buffer" | "write" => Tone::Client,
        "queue" | "connect" | "send" | "wait" | "receive" => Tone::Backend,
        _ => Tone::Own,
    }
}

/// Three rows with an empty one on each side: names, counts, age of the oldest exchange. If space is short, empty
/// phases are dropped.
fn draw_phases(frame: &mut Frame, area: Rect, phases: &[PhaseStatus]) {
    const WIDTH: u16 = 10;
    let room = usize::from(area.width / WIDTH);
    let shown: Vec<&PhaseStatus> = match phases.len() <= room {
        true => phases.iter().collect(),
        false => phases.iter().filter(|phase| phase.active > 0).take(room).collect(),
    };
    if shown.is_empty() {
        frame.render_widget(Paragraph::new(Line::styled("\nNo exchange is under way.", style(Tone::Faint))), area);
        return;
    }
    let cell = |text: String, tone| Span::styled(format!("{text:<9} "), style(tone));
    let tone = |phase: &PhaseStatus, tone| if phase.active > 0 { tone } else { Tone::Faint };
    let names = shown.iter().map(|phase| cell(phase.phase.clone(), tone(phase, side(&phase.phase))));
    let counts = shown.iter().map(|phase| {
        let count = cell(number(phase.active as f64), tone(phase, Tone::Plain));
        if phase.active > 0 { count.style(Style::new().add_modifier(Modifier::BOLD)) } else { count }
    });
    let oldest = shown.iter().map(|phase| {
        let since = if phase.active > 0 { time(phase.oldest_seconds) } else { String::new() };
        cell(since, Tone::Faint)
    });
    let lines = [Line::default(), names.collect(), counts.collect(), oldest.collect()];
    frame.render_widget(Paragraph::new(lines.to_vec()), area);
}

fn draw_sheet(frame: &mut Frame, area: Rect, screen: &mut Screen) {
    let mut sheet = sheet::of(screen.topic, &screen.history);
    let sorted = screen.sorted[screen.topic as usize];
    if let Some(column) = sorted {
        sheet.sort(column, screen.reversed);
    }
    if sheet.rows.is_empty() {
        frame.render_widget(Paragraph::new(Line::styled(sheet.empty, style(Tone::Faint))), area);
        return;
    }
    let window = usize::from(area.height.saturating_sub(1));
    screen.above = screen.above.min(sheet.rows.len().saturating_sub(window));
    frame.render_widget(table(&sheet, area.width, sorted, screen, window), area);
}

fn table<'s>(sheet: &Sheet, width: u16, sorted: Option<usize>, screen: &Screen, window: usize) -> Table<'s> {
    let shown = sheet.fitting(width);
    // The remaining width goes to the widest text column, which is otherwise cut.
    let taken: u16 = shown.iter().map(|&place| sheet.columns[place].width + 1).sum();
    let spare = width.saturating_sub(taken.saturating_sub(1));
    let texts = shown.iter().copied().filter(|&place| sheet.columns[place].text);
    let grows = texts.max_by_key(|&place| sheet.columns[place].width);
    let aligned = |place: usize, text: &str| {
        let line = Line::raw(text.to_owned());
        if sheet.columns[place].text { line.left_aligned() } else { line.right_aligned() }
    };
    let header = shown.iter().map(|&place| {
        let style =
            if sorted == Some(place) { Style::new().add_modifier(Modifier::UNDERLINED) } else { style(Tone::Faint) };
        aligned(place, sheet.columns[place].title).style(style)
    });
    let rows = sheet.rows.iter().skip(screen.above).take(window);
    let rows = rows.map(|row| {
        Row::new(shown.iter().map(|&place| aligned(place, &row[place].shown).style(style(row[place].tone))))
    });
    let widths = shown
        .iter()
        .map(|&place| Constraint::Length(sheet.columns[place].width + if grows == Some(place) { spare } else { 0 }));
    Table::new(rows.collect::<Vec<_>>(), widths).header(Row::new(header)).column_spacing(1)
}

fn last_line(screen: &Screen) -> Line<'static> {
    match &screen.trouble {
        Some((why, since)) => {
            let ago = time(since.elapsed().as_secs_f64());
            let words = iter::once(Span::styled(format!("no answer for {ago}: {}", printable(why)), style(Tone::Bad)));
            words.collect()
        }
        None => Line::styled(KEYS, style(Tone::Faint)),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    use super::*;
    use crate::admin::status::{Bounds, Doing, RouteStatus, SlowClientStatus, Times, UpstreamStatus, WorkerStatus};
    use crate::phase::Phase;

    fn document(second: u64) -> Document {
        let route = |name: &str, each: u64, failed: u64| RouteStatus {
            route: name.to_owned(),
            upstreams: vec!["app".to_owned()],
            exchanges: each * second,
            codes: [("2xx".to_owned(), (each - failed) * second), ("5xx".to_owned(), failed * second)].into(),
            seconds: Times { sum_seconds: 0.0, buckets: vec![each * second, 0] },
            ..RouteStatus::default()
        };
        let endpoint = |name: &str, state: &str| crate::admin::status::EndpointStatus {
            endpoint: name.to_owned(),
            state: state.to_owned(),
            weight: 1,
            selections: 7 * second,
            ..Default::default()
        };
        let phase = |phase: Phase| PhaseStatus {
            phase: phase.name().to_owned(),
            active: phase.index() as u64 % 3,
            oldest_seconds: 4.2,
        };
        Document {
            uptime_seconds: second as f64,
            generation: 3,
            state: "ready".to_owned(),
            workers: vec![WorkerStatus {
                worker: "0".to_owned(),
                busy_seconds: Some(second as f64 / 4.0),
                wait_seconds: Some(second as f64 * 0.75),
                wakeups: Some(90 * second),
                doing: Some(Doing { place: "rate_limit".to_owned(), route: Some("shop".to_owned()), seconds: 0.3 }),
                ..WorkerStatus::default()
            }],
            phases: Phase::ALL.map(phase).to_vec(),
            routes: vec![route("shop", 20, 0), route("uploads", 2, 1)],
            upstreams: vec![UpstreamStatus {
                upstream: "app".to_owned(),
                endpoints: vec![endpoint("10.0.0.1:80", "healthy"), endpoint("10.0.0.2:80", "unhealthy")],
                ..UpstreamStatus::default()
            }],
            slow_clients: crate::admin::status::SlowStatus {
                longest: vec![SlowClientStatus {
                    client: Some([192, 0, 2, 7].into()),
                    phase: "write".to_owned(),
                    target: Some("GET /video".to_owned()),
                    bytes: Some(3 << 20),
                    waited_seconds: 75.0,
                    ..SlowClientStatus::default()
                }],
                ..Default::default()
            },
            bounds: Bounds { exchange_seconds: vec![0.1], lag_seconds: vec![0.001] },
            ..Document::default()
        }
    }

    fn screen() -> Screen {
        let mut screen = Screen::new("127.0.0.1:9100".to_owned());
        (1..=10).for_each(|second| screen.take(Ok(document(second))));
        screen
    }

    fn press(screen: &mut Screen, keys: &str) {
        for key in keys.chars() {
            let code = if key == '\t' { KeyCode::Tab } else { KeyCode::Char(key) };
            screen.obey(KeyEvent::new(code, KeyModifiers::NONE));
        }
    }

    fn drawn(screen: &mut Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer();
        let rows = buffer.content().chunks(usize::from(width));
        rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned() + "\n").collect()
    }

    fn has(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "no `{part}` in:\n{text}");
        }
    }

    #[test]
    fn each_topic_has_its_table() {
        let mut screen = screen();
        has(
            &drawn(&mut screen, 140, 30),
            &["Forebay ready  22 req/s", "configuration 3", "buffer", "25%", "90", "rate_limit of shop for 300 ms"],
        );
        press(&mut screen, "2");
        has(
            &drawn(&mut screen, 140, 30),
            &["shop                    20", "uploads                  2", "50%", "leads to", "app"],
        );
        press(&mut screen, "\t");
        has(&drawn(&mut screen, 140, 30), &["10.0.0.1:80", "healthy", "unhealthy", "     7"]);
        press(&mut screen, "4");
        has(&drawn(&mut screen, 140, 30), &["192.0.2.7", "write", "1m15s", "3.0 MiB", "GET /video"]);
        press(&mut screen, "?");
        has(&drawn(&mut screen, 140, 30), &["sort by the next column"]);
    }

    #[test]
    fn a_small_terminal_has_what_matters_most() {
        let mut screen = screen();
        press(&mut screen, "2");
        let text = drawn(&mut screen, 40, 8);
        has(&text, &["Forebay ready", "shop", "req/s", "p99"]);
        assert!(!text.contains("leads to"), "{text}");
        for (width, height) in [(1, 1), (5, 2), (20, 5), (39, 13), (80, 3)] {
            for keys in ["1", "2", "3", "4", "?"] {
                press(&mut screen, keys);
                drawn(&mut screen, width, height);
            }
        }
    }

    #[test]
    fn rows_are_sorted_reversed_and_scrolled() {
        let mut screen = screen();
        let order = |text: &str| text.find("shop").zip(text.find("uploads")).map(|(shop, uploads)| shop < uploads);
        press(&mut screen, "2ss");
        assert_eq!(order(&drawn(&mut screen, 100, 20)), Some(true), "the busiest first");
        press(&mut screen, "r");
        assert_eq!(order(&drawn(&mut screen, 100, 20)), Some(false));
        press(&mut screen, "jjjjjj");
        has(&drawn(&mut screen, 100, 5), &["shop"]);
        assert_eq!(screen.above, 1, "no further than to the last row");
    }

    #[test]
    fn a_pause_holds_and_a_gateway_that_is_silent_is_told() {
        let mut screen = screen();
        press(&mut screen, "p");
        screen.take(Ok(document(99)));
        has(&drawn(&mut screen, 120, 20), &["paused", "up 10.0 s"]);
        press(&mut screen, "p");
        screen.take(Err("connection refused".to_owned()));
        has(&drawn(&mut screen, 120, 20), &["no answer for", "connection refused", "shop"]);
        screen.take(Ok(document(100)));
        has(&drawn(&mut screen, 120, 20), &["q: quit"]);
    }
}
