//! `coracle demo`: a cluster of processes on this machine, a checked load, faults to inject; by hand or
//! by a script. Owns the order of things, and that everything is gone at the end.

pub mod cluster;
pub mod dataset;
pub mod ledger;
pub mod load;
pub mod ports;
pub mod process;
pub mod screen;
pub mod tour;
pub mod verdict;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_client::NodeId;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::admin::Picture;
use crate::admin::health::Health;
use crate::args::{Demo, Script};
use crate::context::{Contexts, Entry, Environment};
use crate::failure::{Exit, Failure};
use crate::output::{Output, count, duration};

use cluster::{Cluster, ClusterPlan, Node, SHARDS};
use ledger::Ledger;
use load::{Load, Verified, verify};
use screen::{Command, HELP, Screen};

/// What other terminals call the demo's cluster.
const CONTEXT: &str = "demo";

/// Writers of the load.
const WRITERS: usize = 32;

/// Between two looks at the figures; the screen decides whether they are shown.
const TICK: Duration = Duration::from_millis(200);

/// How long the last check may take when the demo is left.
const CHECK_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a demo of an earlier day may take to show that it still runs.
const ALIVE_TIMEOUT: Duration = Duration::from_millis(200);

/// Runs it.
pub async fn run(demo: Demo, output: &Output) -> Result<(), Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot find this program's file: {error}")))?;
    let plan = ClusterPlan {
        program,
        nodes: demo.nodes.into(),
        zones: demo.zones.clone(),
        data_dir: demo.data_dir.clone(),
        in_memory: demo.in_memory,
        settings: Vec::new(),
        ports: None,
    };
    // Before anything is started: a signal from here on ends it in order.
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|error| Failure::failed(format!("cannot wait for signals: {error}")))?;
    let screen = Screen::new(output, demo.plain);
    let mut cluster = Cluster::prepare(&plan)?;
    let mut context = None;
    let result = tokio::select! {
        result = play(&demo, &mut cluster, &mut context, &screen, output) => result,
        _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Interrupted, "interrupted")),
        _ = terminate.recv() => Err(Failure::new(Exit::Interrupted, "interrupted")),
    };
    drop(context);
    let failed = result.as_ref().is_err_and(|failure| failure.exit != Exit::Interrupted);
    if failed {
        cluster.keep_logs();
    }
    let stopping = std::time::Instant::now();
    let dir = cluster.dir().display().to_string();
    cluster.stop().await;
    let data = match failed || demo.data_dir.is_some() {
        true => format!("data and logs stay in {dir}"),
        false => "the data are gone".to_owned(),
    };
    screen.line(&format!("  all nodes stopped in {}; {data}", duration(stopping.elapsed())));
    result
}

async fn play(
    demo: &Demo,
    cluster: &mut Cluster,
    context: &mut Option<ContextGuard>,
    screen: &Screen<'_>,
    output: &Output,
) -> Result<(), Failure> {
    announce(demo, cluster, screen);
    let ready = |node: &Node, after: Duration| {
        let seconds = after.as_secs_f64();
        let (name, zone, address) = (node.name(), node.zone(), node.address());
        screen.line(&format!("  {name}  zone {zone}  {address}  ready  {seconds:.1} s"));
    };
    let took = cluster.start(ready).await?;
    screen.line(&format!("  every shard has a leader                {:.1} s", took.as_secs_f64()));
    *context = write_context(cluster, screen).await;
    match demo.script {
        Some(Script::Tour) => {
            // At least what the tour needs to end in time.
            tour::run(cluster, screen, output, demo.load.max(1_000)).await
        }
        None => by_hand(demo, cluster, screen).await,
    }
}

fn announce(demo: &Demo, cluster: &Cluster, screen: &Screen<'_>) {
    let zones = demo.zones.len().min(demo.nodes.into());
    let disk = if demo.in_memory { "in memory" } else { "on disk" };
    screen.line(&format!(
        "coracle {} · demo · {} nodes in {zones} zones · {SHARDS} shards × {} replicas · {disk}",
        env!("CARGO_PKG_VERSION"),
        demo.nodes,
        demo.nodes.min(3),
    ));
    screen.line("");
    if !cluster.has_preferred_ports() {
        screen.line("  some of the usual ports are taken; these are used instead:");
    }
}

/// The demo's entry among the contexts, for other terminals. Taken out when it is dropped.
struct ContextGuard {
    path: PathBuf,
    name: String,
    entry: Entry,
}

impl Drop for ContextGuard {
    fn drop(&mut self) {
        // A file that cannot be changed any more keeps an entry that leads nowhere; the next demo
        // replaces it.
        if let Ok(mut contexts) = Contexts::load(&self.path)
            && contexts.contexts.get(&self.name) == Some(&self.entry)
        {
            contexts.remove(&self.name);
            let _ = contexts.save(&self.path);
        }
    }
}

async fn write_context(cluster: &Cluster, screen: &Screen<'_>) -> Option<ContextGuard> {
    let endpoints: Vec<String> = cluster.nodes().iter().map(Node::address).collect();
    let entry = Entry { endpoints: endpoints.clone(), keyspace: None };
    let written = async {
        let path = Environment::read().path()?;
        let mut contexts = Contexts::load(&path)?;
        let mut name = CONTEXT.to_owned();
        if let Some(other) = contexts.contexts.get(CONTEXT)
            && is_alive(&other.endpoints).await
        {
            name = format!("{CONTEXT}-{}", std::process::id());
        }
        contexts.contexts.insert(name.clone(), entry.clone());
        contexts.choose(&name);
        contexts.save(&path)?;
        Ok::<_, Failure>(ContextGuard { path, name, entry })
    };
    screen.line("");
    match written.await {
        Ok(guard) => {
            let name = &guard.name;
            screen.line(&format!(
                "  Second terminal (context {name}):  coracle put hello world · coracle get hello · coracle status"
            ));
            Some(guard)
        }
        // The demo is worth as much without it.
        Err(failure) => {
            screen.line(&format!(
                "  other terminals need --endpoints {} ({})",
                endpoints[0], failure.what
            ));
            None
        }
    }
}

/// Whether another demo listens there.
async fn is_alive(endpoints: &[String]) -> bool {
    for endpoint in endpoints {
        let dialled = tokio::time::timeout(ALIVE_TIMEOUT, TcpStream::connect(endpoint)).await;
        if dialled.is_ok_and(|connected| connected.is_ok()) {
            return true;
        }
    }
    false
}

async fn by_hand(demo: &Demo, cluster: &mut Cluster, screen: &Screen<'_>) -> Result<(), Failure> {
    let logs = cluster.dir().display().to_string();
    screen.line(&match (&demo.data_dir, demo.in_memory) {
        (Some(_), _) => format!("  Real disk, real fsync. Data and logs stay in {logs}"),
        (None, true) => format!("  In memory: a node that is killed has lost everything. Logs: {logs}"),
        (None, false) => format!(
            "  Real disk, real fsync. The data go when the demo ends (--data-dir keeps them). Logs: {logs}"
        ),
    });
    screen.line("");
    screen.line(HELP);
    screen.line("");
    let ledger = Arc::new(Ledger::new(format!("{:08x}", rand::random::<u32>())));
    let load = (demo.load > 0).then(|| {
        let keyspace = cluster.client().keyspace("default");
        Load::start(vec![keyspace; WRITERS], ledger.clone(), demo.load)
    });
    let mut hand = Hand { cluster, screen, ledger: &ledger };
    let mut typed = Some(screen::typed());
    let mut ticks = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            line = next(&mut typed) => match line.as_deref().map(Command::parse) {
                Some(Ok(Some(Command::Quit))) => break,
                Some(Ok(Some(command))) => {
                    if let Err(failure) = hand.obey(command).await {
                        screen.event(&failure.what);
                    }
                }
                Some(Ok(None)) => {}
                Some(Err(what)) => screen.line(&what),
                // Nobody can type any more: it goes on until a signal ends it.
                None => typed = None,
            },
            _ = ticks.tick() => {
                if let Some(load) = &load {
                    screen.figures(|| load.take_window());
                }
            }
        }
    }
    if let Some(load) = load {
        load.finish().await;
        last_check(cluster, &ledger, screen).await?;
    }
    Ok(())
}

/// The next line; never one where there are no more.
async fn next(typed: &mut Option<mpsc::Receiver<String>>) -> Option<String> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

/// Everything that was acknowledged is read once more before the demo ends.
async fn last_check(
    cluster: &Cluster,
    ledger: &Ledger,
    screen: &Screen<'_>,
) -> Result<(), Failure> {
    let check = verify(cluster.client(), "default", ledger);
    let Ok(Ok(verified)) = tokio::time::timeout(CHECK_TIMEOUT, check).await else {
        screen.line("  not every key can be read now, so the acknowledged writes were not checked");
        return Ok(());
    };
    let Verified { acknowledged, lost, .. } = verified;
    let checked = count(acknowledged);
    screen.line(&format!("  {checked} acknowledged writes checked, {} lost", lost.len()));
    for loss in &lost {
        screen.line(&format!("  LOST {loss}"));
    }
    match lost.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Exit::Unhealthy, "acknowledged writes were lost")),
    }
}

/// Does what is typed.
struct Hand<'a> {
    cluster: &'a mut Cluster,
    screen: &'a Screen<'a>,
    ledger: &'a Ledger,
}

impl Hand<'_> {
    async fn obey(&mut self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Kill(node) => self.kill(node).await,
            Command::Restart(node) => self.restart(node).await,
            Command::Partition(node) => {
                let at = self.place(node)?;
                self.cluster.partition(at).await?;
                let name = self.cluster.nodes()[at].name();
                self.screen.event(&format!("{name} is cut off from all others. :heal ends it"));
                Ok(())
            }
            Command::Heal => {
                self.cluster.heal().await?;
                self.screen.event("every partition is healed");
                Ok(())
            }
            Command::Status => self.status().await,
            Command::Help => {
                self.screen.line(HELP);
                Ok(())
            }
            Command::Quit => Ok(()),
        }
    }

    /// The node that was named, or the one that leads the busiest shard; it must run.
    fn place(&self, node: Option<NodeId>) -> Result<usize, Failure> {
        let busiest = || tour::busiest(self.ledger).map(|(node, _)| node);
        let running = || self.cluster.nodes().iter().find(|node| node.is_started());
        let node = node.or_else(busiest).or_else(|| running().map(|node| node.id));
        let node = node.ok_or_else(|| Failure::usage("no node runs: r starts them again"))?;
        let at = self.cluster.find(node)?;
        match self.cluster.nodes()[at].is_started() {
            true => Ok(at),
            false => Err(Failure::usage(format!("n{node} does not run: :restart n{node}"))),
        }
    }

    async fn kill(&mut self, node: Option<NodeId>) -> Result<(), Failure> {
        let at = self.place(node)?;
        let id = self.cluster.nodes()[at].id;
        let seen = self.ledger.shards().into_iter().filter(|(_, seen)| seen.node == id);
        let led: std::collections::BTreeSet<_> = seen.map(|(shard, _)| shard).collect();
        let shards = led.len();
        let killed = self.cluster.kill(at);
        self.ledger.watch_failover(id, led, killed);
        self.cluster.reap(at).await;
        self.screen
            .event(&format!("killed n{id} (led {shards} shards of the load). r starts it again"));
        Ok(())
    }

    async fn restart(&mut self, node: Option<NodeId>) -> Result<(), Failure> {
        let places: Vec<usize> = match node {
            Some(node) => vec![self.cluster.find(node)?],
            None => (0..self.cluster.nodes().len()).collect(),
        };
        let stopped = |at: &usize| !self.cluster.nodes()[*at].is_started();
        let places: Vec<usize> = places.into_iter().filter(stopped).collect();
        if places.is_empty() {
            return Err(Failure::usage("nothing was killed"));
        }
        self.cluster.restart(&places).await?;
        for at in places {
            let name = self.cluster.nodes()[at].name();
            self.screen.event(&format!("{name} is back"));
        }
        Ok(())
    }

    async fn status(&self) -> Result<(), Failure> {
        let picture = Picture::take(self.cluster.client()).await?;
        let health = Health::of(&picture.map, &picture.nodes);
        self.screen.line(&format!("  {}", health.sentence()));
        for problem in health.problems() {
            self.screen.line(&format!("  ! {problem}"));
        }
        if let Some(failover) = self.ledger.failover() {
            let slowest = failover.first_writes.values().max();
            let slowest = slowest.map_or_else(|| "never".to_owned(), |after| duration(*after));
            let (back, led) = (failover.first_writes.len(), failover.led.len());
            self.screen.line(&format!(
                "  last kill: {back} of {led} shards write again, the slowest after {slowest}"
            ));
        }
        Ok(())
    }
}
