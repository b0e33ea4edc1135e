//! The command line: its syntax, and what each command does with a [`Builder`].
//!
//! The caller passes the builder, so that a program with its own filters gets a command line that knows them:
//! `check` validates them and `schema` lists them. Nothing here exits the process. [`main()`] returns the exit
//! code: 0 for success, 1 for a failure at run time, 2 for wrong usage, 78 for an invalid configuration.

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
  FOREBAY_CONFIG      the configuration file, if there is no -c
  FOREBAY_ADMIN_TOKEN the token for an admin endpoint given by --admin
  FOREBAY_LOG         the log filter for stderr, such as `debug` or `warn,forebay=debug`
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
    /// Run the gateway until a signal stops it
    Run(Run),
    /// Write a small, commented configuration that is ready to run
    Init(init::Init),
    /// Run a gateway without a file: from one address to one or more backends
    Proxy(proxy::Proxy),
    /// Convert an nginx configuration, and report what has no equivalent
    Import(import::Import),
    /// Check the configuration and report all errors
    #[command(visible_alias = "validate")]
    Check(ConfigFile),
    /// Reload the configuration of a running gateway and show what changed; an invalid one changes nothing
    Reload(admin::Where),
    /// Replace a running gateway by a new process, of the same program or a newer one, and show the result; if the
    /// new process does not become ready, the old one continues
    Upgrade(upgrade::Upgrade),
    /// Show what a reload would change, and which connections and state each change would end
    Diff(admin::Where),
    /// Explain how the configuration handles a request: listener, route and why the others do not match, filters,
    /// upstream, and the source of each value. Sends nothing. Exit code 0 if a route matches, 1 if not
    Match(matched::Match),
    /// Format files: indentation and empty lines; comments, order and quotes stay
    Fmt(fmt::Fmt),
    /// Print the effective configuration, including defaults, without secrets
    Dump(ConfigFile),
    /// Show a summary of a running gateway: exit code 0 if it is ready, 1 if not
    Status(admin::Where),
    /// Stop a running gateway gracefully, and wait until it has stopped
    Stop(reload::Stop),
    /// Print the JSON Schema of the configuration, for editors
    Schema,
    /// List the certificates of the configuration: names, keys, expiry, problems; exit code 1 if there are problems
    Certs(ConfigFile),
    /// Run the built-in test origin alone
    #[command(after_help = format!("Paths:\n{}", origin::PATHS))]
    Origin {
        /// The address to listen on; port 0 means any free port
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Check whether a running gateway is ready: exit code 0 if it is, 1 if not
    Healthcheck(Healthcheck),
    /// Show a running gateway live on the terminal: event loop, routes, upstreams, slow clients
    Top(top::Top),
    /// Record the next matching exchanges of a running gateway, and draw their phases as waterfalls
    Trace(trace::Trace),
    /// Show four clients on one worker: its recorded event loop, cycle by cycle
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
        /// The target directory; it is created
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
    /// Reload the configuration whenever its files change
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
    /// The address of the demo gateway
    #[arg(long, value_name = "ADDRESS", requires = "demo", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// The address of the demo's admin endpoint
    #[arg(long, value_name = "ADDRESS", requires = "demo", default_value = "127.0.0.1:9100")]
    admin: SocketAddr,
}

#[derive(Args)]
struct Healthcheck {
    #[command(flatten)]
    config: ConfigFile,
    /// The URL to request instead of /readyz at the admin address of the configuration
    #[arg(long, conflicts_with = "path")]
    url: Option<http::Uri>,
}

/// Why a command failed.
#[derive(Debug)]
enum Failure {
    /// Wrong usage.
    Usage(String),
    /// The configuration has these errors.
    Report(Report),
    /// There is no configuration.
    Config(String),
    /// A failure at run time.
    Runtime(String),
}

impl Failure {
    /// A failed system call; `doing` names the operation.
    fn io(doing: &str) -> impl FnOnce(io::Error) -> Failure + '_ {
        move |error| Failure::Runtime(format!("cannot {doing}: {}", plain(&error)))
    }

    /// Prints the failure to stderr and returns the exit code.
    fn tell(self) -> ExitCode {
        let (text, code) = self.text(colourful(&io::stderr()));
        complain(text.trim_end());
        ExitCode::from(code)
    }

    /// The text of the failure, and the exit code.
    fn text(&self, colours: bool) -> (String, u8) {
        match self {
            Failure::Usage(message) => (told(message), EXIT_USAGE),
            Failure::Report(report) => (report.render(colours), EXIT_CONFIG),
            Failure::Config(message) => (told(message), EXIT_CONFIG),
            Failure::Runtime(message) => (told(message), EXIT_RUNTIME),
        }
    }
}

/// Runs the command line `arguments`, with the program's name first, and returns the exit code.
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
            // `--help` and `--version` also come here, with code 0.
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

/// The text of a failure, made safe for a terminal: it may come from an admin endpoint.
fn told(message: &str) -> String {
    format!("forebay: {}", shown(message, |character| character == '\n'))
}

/// Writes to stdout. A closed pipe (`| head -1`) is not an error.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::io("write to stdout")(error)),
        _ => Ok(()),
    }
}

/// Writes to stderr. If it is closed, only the exit code remains.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether `stream` is a terminal that wants colours (<https://no-color.org>).
fn colourful(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The system's error text without the number, in lower case.
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
