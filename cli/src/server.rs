//! `coracle server`. Owns the joint to the server crate: from flags, environment and file to its
//! settings, and from its start to its end, by signal or by itself. Does not know what a node does.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use coracle_server::RunningNode;
use coracle_server::config::{Config, Flag, LogFormat, SourceFile, Sources, split_set};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::args::{Server, Settings};
use crate::failure::{Exit, Failure};
use crate::flood::Flood;
use crate::notify::Notifier;
use crate::output::Output;

/// How long a node may take to hand its leaderships over before it stops regardless. Handing over
/// takes milliseconds a shard: what nobody has taken over by then, nobody will (the other nodes are
/// going too), and service managers wait longer than this before they kill.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// How often a node of a demo looks whether its demo still lives.
const PARENT_INTERVAL: Duration = Duration::from_millis(200);

/// Runs a node until a signal or a fatal error ends it.
pub async fn run(server: Server, output: &Output) -> Result<(), Failure> {
    let config = load(&server.settings, None)?;
    let flood = start_logs(&config)?;
    // Before the start: a signal that arrives while the log is replayed must not be lost.
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let banner = banner(&config);
    let node = tokio::select! {
        node = coracle_server::run(config) => node.map_err(|error| {
            Failure::failed(format!("the node does not start: {error}"))
                .next("nothing was changed; `coracle config show --origin` shows the settings")
        })?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
        () = orphaned(server.exit_with_parent) => return Ok(()),
    };
    let addresses = node.addresses();
    output.note(&format!(
        "{banner}  clients {}   nodes {}   http {}",
        addresses.client, addresses.peer, addresses.http
    ));
    let notifier = Notifier::from_env();
    let told = async {
        // A service manager that restarts node after node goes on when this one can lead again.
        node.ready().await;
        notifier.ready(&format!("listens for clients at {}", addresses.client));
        std::future::pending().await
    };
    tokio::select! {
        () = told => Ok(()),
        () = flood.tell() => Ok(()),
        () = stopped(&node) => {
            Err(Failure::failed("the node has stopped by itself; its log says why"))
        }
        _ = terminate.recv() => drain(&node, "SIGTERM", &notifier).await,
        _ = interrupt.recv() => drain(&node, "SIGINT", &notifier).await,
        // Nobody is left who would read its files: the scratch directory is the demo's.
        () = orphaned(server.exit_with_parent) => Ok(()),
    }
}

async fn stopped(node: &RunningNode) {
    node.stopped().await;
}

async fn drain(node: &RunningNode, signal: &str, notifier: &Notifier) -> Result<(), Failure> {
    notifier.stopping("hands leaderships over");
    tracing::info!(signal, "handing leaderships over, then stopping");
    node.drain_and_stop(DRAIN_DEADLINE).await;
    tracing::info!("stopped");
    Ok(())
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal, Failure> {
    signal(kind).map_err(|error| Failure::failed(format!("cannot wait for signals: {error}")))
}

/// Returns when `parent` is no longer this process's parent; never without one.
async fn orphaned(parent: Option<u32>) {
    let Some(parent) = parent.and_then(|parent| i32::try_from(parent).ok()) else {
        return std::future::pending().await;
    };
    let mut interval = tokio::time::interval(PARENT_INTERVAL);
    loop {
        interval.tick().await;
        let now = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
        if now != parent {
            return;
        }
    }
}

/// All settings, checked together; every problem at once. `file` is one named beside `--config`.
pub fn load(settings: &Settings, file: Option<&Path>) -> Result<Config, Failure> {
    let path = file.or(settings.config.as_deref());
    let file = path.map(read).transpose()?;
    let (set, unreadable): (Vec<_>, Vec<_>) =
        settings.set.iter().map(|text| split_set(text)).partition(Result::is_ok);
    let sources = Sources {
        file,
        env: std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect(),
        set: set.into_iter().flatten().collect(),
        flags: flags(settings),
        memory_bytes: coracle_server::machine_memory_bytes(),
    };
    let mut problems: Vec<String> =
        unreadable.into_iter().filter_map(Result::err).map(|problem| problem.to_string()).collect();
    match Config::load(&sources) {
        Ok(config) if problems.is_empty() => Ok(config),
        Ok(_) => Err(refused(&problems)),
        Err(found) => {
            problems.extend(found.iter().map(ToString::to_string));
            Err(refused(&problems))
        }
    }
}

fn refused(problems: &[String]) -> Failure {
    let count = match problems.len() {
        1 => "a problem".to_owned(),
        many => format!("{many} problems"),
    };
    let text = format!("the settings have {count}\n\n{}\n", problems.join("\n\n"));
    Failure::new(Exit::Failed, text).next("coracle config explain KEY")
}

fn read(path: &Path) -> Result<SourceFile, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::io("read the settings in", path, &error))?;
    Ok(SourceFile { path: path.display().to_string(), text })
}

fn flags(settings: &Settings) -> Vec<Flag> {
    let named = [
        ("--data-dir", "node.data_dir", &settings.data_dir),
        ("--zone", "node.zone", &settings.zone),
        ("--listen", "listen.client", &settings.listen),
        ("--peer-listen", "listen.peer", &settings.peer_listen),
        ("--http-listen", "listen.http", &settings.http_listen),
        ("--advertise", "listen.advertise_client", &settings.advertise),
        ("--peer-advertise", "listen.advertise_peer", &settings.peer_advertise),
        ("--join", "cluster.join", &settings.join),
        ("--log-format", "observability.log_format", &settings.log_format),
        ("--log", "observability.log_filter", &settings.log),
    ];
    let given = named
        .into_iter()
        .filter_map(|(flag, key, value)| Some(Flag { flag, key, value: value.clone()? }));
    let insecure = settings.insecure.then(|| Flag {
        flag: "--insecure",
        key: "listen.insecure",
        value: "true".to_owned(),
    });
    given.chain(insecure).collect()
}

/// Logs go to standard error; what is logged stands in the settings.
fn start_logs(config: &Config) -> Result<Flood, Failure> {
    let filter = EnvFilter::try_new(&config.observability.log_filter)
        .map_err(|error| Failure::usage(format!("observability.log_filter: {error}")))?;
    let terminal = std::io::stderr().is_terminal();
    let json = match config.observability.log_format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !terminal,
    };
    let flood = Flood::default();
    // Colours are for terminals; in a file they are noise.
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(terminal);
    let logs = tracing_subscriber::registry().with(filter);
    match json {
        true => logs.with(lines.json().with_filter(flood.clone())).init(),
        false => logs.with(lines.with_filter(flood.clone())).init(),
    }
    Ok(flood)
}

/// What is said once, when the node serves.
fn banner(config: &Config) -> String {
    let mut text = format!(
        "coracle {} · data {} · zone {}\n",
        env!("CARGO_PKG_VERSION"),
        config.node.data_dir.display(),
        config.node.zone,
    );
    let changed = config.show(true, true);
    for line in changed.lines().filter(|line| !line.trim().is_empty()) {
        text.push_str(&format!("  {line}\n"));
    }
    if config.test.in_memory {
        text.push_str("  IN MEMORY: everything is gone when this process ends\n");
    }
    if config.listen.insecure {
        text.push_str("  INSECURE: nothing is encrypted, and nobody has to say who they are\n");
    }
    text
}
