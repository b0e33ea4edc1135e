//! The command line: what can be typed, and what each command does with a [`Builder`].
//!
//! The builder comes from the caller, so that a program with filters of its own gets a command line that knows them:
//! its `check` finds their errors and its `schema` lists them. Nothing here exits the process; [`main()`] returns the
//! code to exit with: 0, 1 for what failed at run time, 2 for wrong usage, 78 for a wrong configuration.

mod admin;
mod certs;
mod check;
mod config_file;
mod figures;
mod fmt;
mod healthcheck;
mod import;
mod init;
mod logs;
mod man;
mod matched;
mod proxy;
mod reload;
mod run;
mod stop;
mod timeline;
mod top;
mod trace;
mod upgrade;
mod waterfall;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::Report;
use crate::gateway::Builder;
use crate::gateway::upgrade::Program;
use crate::origin::{self, Origin};
use crate::printable::shown;

const EXIT_RUNTIME: u8 = 1;
const EXIT_USAGE: u8 = 2;
/// `EX_CONFIG` of sysexits.h.
const EXIT_CONFIG: u8 = 78;

const AFTER_HELP: &str = "\
Environment:
  FOREBAY_CONFIG      the configuration file, where no -c is given
  FOREBAY_ADMIN_TOKEN the token of an admin endpoint that is named by --admin
  FOREBAY_LOG         what is logged on stderr, such as `debug` or `warn,forebay=debug`
  FOREBAY_LOG_FORMAT  `compact` (the default) or `json`
  NO_COLOR            no colours, whatever its value

The configuration file is the one of -c, else $FOREBAY_CONFIG, else ./forebay.yaml,
else /etc/forebay/forebay.yaml.

Exit codes: 0 done, 1 failed while running, 2 wrong usage, 78 wrong configuration.";

/// An edge gateway that takes the slow side off your backends.
#[derive(Parser)]
#[command(name = "forebay", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
#[command(arg_required_else_help = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    /// Check the configuration and exit, like `forebay check`
    #[arg(short = 't', long = "test")]
    test: bool,
    #[command(flatten)]
    config: ConfigFile,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway until it is told to stop
    Run(Run),
    /// Write a first configuration: small, with comments, and ready to run
    Init(init::Init),
    /// Run a gateway without a file: from one address to one or more backends
    Proxy(proxy::Proxy),
    /// Make a configuration of one of nginx, with a report of what has no equal
    Import(import::Import),
    /// Check the configuration: tell all its errors, or that it is ok
    #[command(visible_alias = "validate")]
    Check(ConfigFile),
    /// Have a running gateway load its configuration again, and tell what has changed; a wrong one changes nothing
    Reload(admin::Where),
    /// Have a new process take over from a running gateway, of the same program or of a newer one in its place, and tell
    /// what came of it; if it does not become ready, the old one serves on
    Upgrade(upgrade::Upgrade),
    /// Tell what a reload would change, and what each change would end
    Diff(admin::Where),
    /// Tell what becomes of a request by a configuration: listener, route and why not the others, filters, upstream,
    /// and where each value comes from; nothing is sent. Exit code 0 if a route takes it, 1 if not
    Match(matched::Match),
    /// Bring files into their normal form: indentation and empty lines; comments, order and quotes stay
    Fmt(fmt::Fmt),
    /// Print what is in effect by a configuration, defaults among it, without secrets
    Dump(ConfigFile),
    /// Tell in a few lines how a running gateway does: exit code 0 if it is ready, 1 if not
    Status(admin::Where),
    /// Stop a running gateway gracefully, and wait until it has stopped
    Stop(reload::Stop),
    /// Print the JSON Schema of the configuration, for editors
    Schema,
    /// List the certificates of the configuration: names, keys, when they end, what is wrong; exit code 1 if anything
    /// is
    Certs(ConfigFile),
    /// Run the built-in test origin alone
    #[command(after_help = format!("Paths:\n{}", origin::PATHS))]
    Origin {
        /// Where it listens; port 0 is a free one
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Ask a running gateway whether it is ready: exit code 0 if it is, 1 if not
    Healthcheck(Healthcheck),
    /// Show how a running gateway does, live on the terminal: loop, routes, upstreams, slow clients
    Top(top::Top),
    /// Record the next exchanges of a running gateway that match, and draw their phases as waterfalls
    Trace(trace::Trace),
    /// Show four clients on one worker: its event loop, cycle by cycle, as it was recorded
    Timeline(timeline::Timeline),
    /// Print the version
    Version,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(hide = true)]
    Man {
        /// Where to; it is made
        directory: PathBuf,
    },
}

#[derive(Args)]
struct ConfigFile {
    /// The configuration file
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    path: Option<PathBuf>,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    config: ConfigFile,
    /// Load the configuration again whenever its file changes
    #[arg(long, conflicts_with = "demo")]
    watch: bool,
    /// Run in front of the built-in test origin, without a file
    #[arg(long, conflicts_with = "path")]
    demo: bool,
    #[command(flatten)]
    addresses: DemoAddresses,
}

#[derive(Args)]
struct DemoAddresses {
    /// Where the gateway of the demo listens
    #[arg(long, value_name = "ADDRESS", requires = "demo", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where the admin endpoint of the demo listens
    #[arg(long, value_name = "ADDRESS", requires = "demo", default_value = "127.0.0.1:9100")]
    admin: SocketAddr,
}

#[derive(Args)]
struct Healthcheck {
    #[command(flatten)]
    config: ConfigFile,
    /// What to ask, in place of /readyz at the admin address of the configuration
    #[arg(long, conflicts_with = "path")]
    url: Option<http::Uri>,
}

/// Why a command did not do what it was asked to.
#[derive(Debug)]
enum Failure {
    /// It was not asked properly.
    Usage(String),
    /// The configuration is wrong, at these places.
    Report(Report),
    /// There is no configuration to begin with.
    Config(String),
    /// It went wrong later.
    Runtime(String),
}

impl Failure {
    /// A failure of the system, with what was tried when it struck.
    fn io(doing: &str) -> impl FnOnce(io::Error) -> Failure + '_ {
        move |error| Failure::Runtime(format!("cannot {doing}: {}", plain(&error)))
    }

    /// Tells it on stderr and gives the code to exit with.
    fn tell(self) -> ExitCode {
        let (text, code) = self.text(colourful(&io::stderr()));
        complain(text.trim_end());
        ExitCode::from(code)
    }

    /// What is told of it, and the code to exit with.
    fn text(&self, colours: bool) -> (String, u8) {
        match self {
            Failure::Usage(message) => (told(message), EXIT_USAGE),
            Failure::Report(report) => (report.render(colours), EXIT_CONFIG),
            Failure::Config(message) => (told(message), EXIT_CONFIG),
            Failure::Runtime(message) => (told(message), EXIT_RUNTIME),
        }
    }
}

/// Does what the command line `arguments` say, the program's name first, and returns the code to exit with.
pub fn main<A>(builder: Builder, arguments: impl IntoIterator<Item = A>) -> ExitCode
where
    A: Into<OsString> + Clone,
{
    let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
    let builder = match Program::of_this_process(&arguments) {
        Some(program) => builder.upgrading(program),
        None => builder,
    };
    let command_line = match CommandLine::try_parse_from(arguments) {
        Ok(command_line) => command_line,
        Err(error) => {
            // `--help` and `--version` come this way too, with code 0.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match dispatch(builder, command_line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(),
    }
}

fn dispatch(builder: Builder, line: CommandLine) -> Result<(), Failure> {
    let Some(command) = line.command else {
        return match line.test {
            true => check::check(&builder, line.config),
            false => Err(Failure::Usage(
                "-c belongs to a command: write `forebay run -c FILE` or `forebay -t -c FILE`".into(),
            )),
        };
    };
    match command {
        Command::Run(run) if run.demo => run::demo(builder, &run.addresses),
        Command::Run(run) => run::run(builder, run.config, run.watch),
        Command::Init(asked) => init::init(&builder, &asked),
        Command::Proxy(asked) => proxy::proxy(builder, &asked),
        Command::Import(asked) => import::import(&builder, &asked),
        Command::Reload(place) => reload::reload(&builder, place),
        Command::Upgrade(asked) => upgrade::upgrade(&builder, asked),
        Command::Diff(place) => reload::diff(&builder, place),
        Command::Match(asked) => matched::matched(&builder, asked),
        Command::Fmt(asked) => fmt::fmt(&builder, asked),
        Command::Dump(file) => reload::dump(&builder, file),
        Command::Status(place) => reload::status(&builder, place),
        Command::Stop(asked) => reload::stop(&builder, asked),
        Command::Check(file) => check::check(&builder, file),
        Command::Certs(file) => certs::certs(&builder, file),
        Command::Schema => print(&format!("{:#}", builder.schema())),
        Command::Origin { listen } => run_origin(listen),
        Command::Healthcheck(Healthcheck { url, config }) => healthcheck::healthcheck(&builder, url, config),
        Command::Top(asked) => top::top(&builder, asked),
        Command::Trace(asked) => trace::trace(&builder, asked),
        Command::Timeline(asked) => timeline::timeline(builder, &asked),
        Command::Version => print(CommandLine::command().render_version().trim_end()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut CommandLine::command(), "forebay", &mut script);
            print(String::from_utf8_lossy(&script).trim_end())
        }
        Command::Man { directory } => man::man(&directory),
    }
}

fn run_origin(listen: SocketAddr) -> Result<(), Failure> {
    logs::start()?;
    let origin =
        Origin::bind(listen).map_err(|error| Failure::Runtime(run::cannot_listen(&listen.to_string(), &error)))?;
    print(&format!("The test origin listens on http://{0}; `curl http://{0}/` lists its paths.", origin.address()))?;
    origin.run(stop::asked()).map_err(Failure::io("run the test origin"))
}

/// What is told of a failure. Its words may come from elsewhere: from an admin endpoint, say.
fn told(message: &str) -> String {
    format!("forebay: {}", shown(message, |character| character == '\n'))
}

/// Writes to stdout. A reader that went away (`| head -1`) had what it wanted.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::io("write to stdout")(error)),
        _ => Ok(()),
    }
}

/// Writes to stderr. Where that is closed, the exit code is all that can be told.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether `stream` is read by a person who wants colours (<https://no-color.org>).
fn colourful(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// What the system said, as one would say it: without the number, in lower case.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map(|first| first.to_ascii_lowercase()).into_iter().chain(letters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn a_failure_is_told_in_words_that_steer_no_terminal() {
        assert_eq!(told("it says\n\u{1b}[2J\u{9b}H\u{202e}"), "forebay: it says\n\\u001b[2J\\u009bH\\u202e");
    }

    #[test]
    fn an_error_of_the_system_reads_as_prose() {
        assert_eq!(plain(&io::Error::from_raw_os_error(libc::EACCES)), "permission denied");
        assert_eq!(plain(&io::Error::other("Two words")), "two words");
    }
}
