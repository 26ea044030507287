//! Owns the tour: a demo that runs by itself, says what it does, and ends with a verdict. Each step is
//! a function; what they measure is judged in `verdict`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_client::admin::NewKeyspace;
use coracle_client::{Client, NodeId};

use crate::args::RecordFormat;
use crate::failure::{Exit, Failure};
use crate::import::{Plan, import_all};
use crate::output::{Output, count, duration};

use super::cluster::Cluster;
use super::dataset::{Compared, Dataset, RECORDS_MAX};
use super::ledger::{Failover, Ledger, ShardSeen};
use super::load::{Load, verify};
use super::screen::{Screen, figures_line};
use super::verdict::{Figures, WRITES_MIN};

/// Where the imported records go: apart from the load's.
const KEYSPACE: &str = "packages";

/// Writers of the load: enough that writes are always in flight on every shard.
const WRITERS: usize = 64;

/// Load before the kill: long enough to know which shard is busiest, and who leads it.
const BEFORE_KILL: Duration = Duration::from_secs(4);

/// Acknowledged writes that are aimed at: a fifth more than are wanted.
const WRITES_AIM: u64 = WRITES_MIN + WRITES_MIN / 5;

/// How long the shards of a killed node may take until each has taken a write.
const FAILOVER_DEADLINE: Duration = Duration::from_secs(20);

/// How long the restarted node may take to catch up.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(60);

/// How long the load may take to reach its aim.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);

/// How long to wait for a moment with a write in flight on the busiest leader.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Between two looks.
const POLL: Duration = Duration::from_millis(5);

/// Between two lines of figures.
const FIGURES_INTERVAL: Duration = Duration::from_secs(2);

/// Takes the tour on a cluster that stands. `rate` is in operations per second.
pub async fn run(
    cluster: &mut Cluster,
    screen: &Screen<'_>,
    output: &Output,
    rate: u32,
) -> Result<(), Failure> {
    let dataset = Dataset::find(cluster.dir()).await?;
    let mut figures = Figures {
        imported: import(cluster, screen, output, &dataset).await?,
        ..Figures::default()
    };

    screen.caption("Load: writers that note every acknowledgement, and read their own keys back");
    let ledger = Arc::new(Ledger::new(format!("{:08x}", rand::random::<u32>())));
    let keyspace = cluster.client().keyspace("default");
    let load = Load::start(vec![keyspace; WRITERS], ledger.clone(), rate);
    let mut watch = Watch::new(&load, screen);
    let acknowledged = watch.until(BEFORE_KILL, |_| false).await;
    screen.event(&format!("{} writes acknowledged", count(acknowledged)));

    screen.caption("kill -9 the node that leads the busiest shard, with writes in flight");
    let (victim, in_flight) = kill(cluster, &ledger, screen).await?;
    figures.in_flight_at_kill = in_flight;
    let failover = watch_failover(&mut watch, &ledger, screen).await;
    figures.shards_led = failover.led.len();
    figures.failover_first = failover.first_writes.values().min().copied();
    let all = failover.first_writes.len() == failover.led.len();
    figures.failover_last = failover.first_writes.values().max().copied().filter(|_| all);

    screen.caption("Start it again, and wait until it has caught up");
    let restarted = Instant::now();
    cluster.restart(&[victim]).await?;
    cluster.wait_caught_up(victim, restarted + CATCH_UP_DEADLINE).await?;
    figures.caught_up = restarted.elapsed();
    let name = cluster.nodes()[victim].name();
    screen.event(&format!("{name} is back, caught up after {}", duration(figures.caught_up)));

    watch.until(LOAD_DEADLINE, |ledger| ledger.acknowledgements() >= WRITES_AIM).await;
    figures.lost_under_load = watch.lost;
    load.finish().await;

    screen.caption("Read every acknowledged write back, linearizably, and compare with the ledger");
    let reader = client(cluster, victim)?;
    figures.verified = verify(&reader, "default", &ledger).await?;
    figures.imported_after = dataset.compare(&reader.keyspace(KEYSPACE)).await?;
    screen.event(&format!(
        "{} acknowledged writes and {} records read",
        count(figures.verified.acknowledged),
        count(figures.imported_after.equal)
    ));

    screen.caption("Verdict");
    screen.line(figures.block().trim_end());
    match figures.shortcomings().is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Exit::Unhealthy, "the tour has not shown what it should")),
    }
}

/// Imports the data through one node, and reads them back through another.
async fn import(
    cluster: &Cluster,
    screen: &Screen<'_>,
    output: &Output,
    dataset: &Dataset,
) -> Result<Compared, Failure> {
    screen.caption("Import a real data set, one record per package");
    let writer = client(cluster, 0)?;
    let made = writer.admin().create_keyspace(NewKeyspace::new(KEYSPACE)).await;
    made.map_err(|error| Failure::call("make the keyspace", &error))?;
    let plan = Plan {
        file: dataset.file.clone(),
        format: RecordFormat::Packages,
        resume: None,
        skip_bad: true,
        limit: Some(RECORDS_MAX as u64),
        concurrency: 256,
    };
    let started = Instant::now();
    let done = import_all(&plan, &writer.keyspace(KEYSPACE), output).await?;
    screen.event(&format!(
        "{} records of {} imported through {} in {}",
        count(done.records),
        dataset.origin,
        cluster.nodes()[0].name(),
        duration(started.elapsed())
    ));
    let other = cluster.nodes().len() - 1;
    let started = Instant::now();
    let compared = dataset.compare(&client(cluster, other)?.keyspace(KEYSPACE)).await?;
    screen.event(&format!(
        "{} read back through {} in {}, each the same byte for byte: {}",
        count(compared.equal),
        cluster.nodes()[other].name(),
        duration(started.elapsed()),
        if compared.wrong_count == 0 { "yes" } else { "NO" }
    ));
    Ok(compared)
}

/// A client that knows only one node to begin with.
fn client(cluster: &Cluster, at: usize) -> Result<Client, Failure> {
    let node = &cluster.nodes()[at];
    let builder = Client::builder().seeds([node.address()]).name("coracle-tour");
    builder
        .operation_timeout(crate::context::TIMEOUT_DEFAULT)
        .connect_lazy()
        .map_err(|error| Failure::call("make a client", &error))
}

/// The node whose shard took most writes, and all shards that it leads.
pub fn busiest(ledger: &Ledger) -> Option<(NodeId, BTreeSet<coracle_client::ShardId>)> {
    let shards = ledger.shards();
    let node = shards.values().max_by_key(|seen: &&ShardSeen| seen.writes)?.node;
    let led = shards.iter().filter(|(_, seen)| seen.node == node).map(|(shard, _)| *shard);
    Some((node, led.collect()))
}

/// Kills the node that leads the busiest shard, at a moment when writes to it are unanswered. Returns
/// its place, and how many were: those that were under way before the signal and still after it.
async fn kill(
    cluster: &mut Cluster,
    ledger: &Ledger,
    screen: &Screen<'_>,
) -> Result<(usize, usize), Failure> {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        if let Some((node, led)) = busiest(ledger) {
            let at = cluster.find(node)?;
            let before = ledger.in_flight_on(&led);
            // Without a write in flight the kill would prove nothing; at the deadline it is done
            // anyway, and the verdict says so.
            if !before.is_empty() || Instant::now() >= deadline {
                let killed = cluster.kill(at);
                let after = ledger.in_flight_on(&led);
                let in_flight = before.intersection(&after).count();
                ledger.watch_failover(node, led.clone(), killed);
                cluster.reap(at).await;
                let text = format!(
                    "killed n{node}: it led {} shards, {in_flight} writes to them were in flight",
                    led.len()
                );
                screen.event(&text);
                return Ok((at, in_flight));
            }
        } else if Instant::now() >= deadline {
            return Err(Failure::new(Exit::Unhealthy, "no write was acknowledged at all"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until every shard that the killed node led has taken a write again.
async fn watch_failover(watch: &mut Watch<'_>, ledger: &Ledger, screen: &Screen<'_>) -> Failover {
    let done = |ledger: &Ledger| {
        ledger.failover().is_some_and(|failover| failover.first_writes.len() == failover.led.len())
    };
    watch.until(FAILOVER_DEADLINE, done).await;
    let failover = ledger.failover().expect("the kill has begun it");
    let (first, last) =
        (failover.first_writes.values().min(), failover.first_writes.values().max());
    if let (Some(first), Some(last)) = (first, last) {
        screen.event(&format!(
            "first write after {:.2} s; {} of {} shards write again, the slowest after {:.2} s",
            first.as_secs_f64(),
            failover.first_writes.len(),
            failover.led.len(),
            last.as_secs_f64()
        ));
    }
    failover
}

/// Shows the load's figures while something is waited for.
struct Watch<'a> {
    load: &'a Load,
    screen: &'a Screen<'a>,
    shown: Instant,
    /// Reads that found an acknowledged write missing, so far.
    lost: u64,
}

impl<'a> Watch<'a> {
    fn new(load: &'a Load, screen: &'a Screen<'a>) -> Watch<'a> {
        Watch { load, screen, shown: Instant::now(), lost: 0 }
    }

    /// Waits so long, or until `done`. Returns the acknowledged writes.
    async fn until(&mut self, limit: Duration, done: impl Fn(&Ledger) -> bool) -> u64 {
        let deadline = Instant::now() + limit;
        let ledger = self.load.ledger();
        while Instant::now() < deadline && !done(ledger) {
            if self.shown.elapsed() >= FIGURES_INTERVAL {
                self.show();
            }
            tokio::time::sleep(POLL).await;
        }
        self.show();
        ledger.acknowledgements()
    }

    fn show(&mut self) {
        self.shown = Instant::now();
        let window = self.load.take_window();
        self.lost += window.lost;
        self.screen.line(&figures_line(&window));
    }
}
