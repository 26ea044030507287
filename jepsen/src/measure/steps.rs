//! Processes that are killed between any two steps of work on replicas and shards: whoever is left goes
//! on, or takes it back. Owns the rounds: at which point who is killed, and what must be so afterwards.
//! Which work comes by which point, and what it may leave behind, is `steps_work`'s. The points are the
//! server's own list (`coracle_server::cluster::Point`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::Duration;

use coracle_client::admin::{ClusterOperation, Control, OperationId};
use coracle_client::{ClusterMap, ShardId};
use coracle_server::cluster::Point;
use tokio::time::Instant;

use super::block_on;
use super::load::Load;
use super::moves::{self, MapWatch};
use super::steps_work::{Cast, Crew, Work, ending, pair_on_the_same_nodes, works_at};
use crate::cluster::process::{Cluster, Setup};

/// Work waits so long at each point: the harness sees it and kills meanwhile.
const HOLD: Duration = Duration::from_millis(250);
/// Between two looks at the logs.
const LISTEN: Duration = Duration::from_millis(10);
/// A point is reached within this, or not at all.
const REACH: Duration = Duration::from_secs(45);
/// A replica is given up when its node has been silent for a minute; for less, where steps are held.
const REACH_LATE: Duration = Duration::from_secs(120);
/// Whoever was killed comes back so much later: the others have noticed by then.
const AWAY: Duration = Duration::from_secs(1);
/// Nothing may be left over so long after the work has ended.
const LEFT_OVER: Duration = Duration::from_secs(40);
/// One writer a shard, so that what moves is in use.
const WRITE_PAUSE: Duration = Duration::from_millis(20);
/// So many shards at most, the meta group among them.
const SHARDS_MAX: usize = 8;
/// How often a leader is killed in the middle of a change of voters, each time a little later, until it
/// leaves one half done.
const HALVES: u32 = 40;
const HALVES_APART: Duration = Duration::from_millis(1);

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's program; `None` for the one beside this.
    pub program: Option<PathBuf>,
    /// Who is killed.
    pub victims: Vec<Victim>,
    /// Only at this point.
    pub only: Option<String>,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Victim {
    /// The node that leads the meta group, and so does the work.
    Controller,
    /// The node of the replica that goes.
    Source,
    /// The node of the replica that comes.
    Target,
}

/// Runs, prints, and says whether all held.
pub fn run(plan: &Plan) -> Result<bool, String> {
    block_on(measure(plan))
}

async fn measure(plan: &Plan) -> Result<bool, String> {
    let points = Point::ALL.into_iter();
    let asked = |point: &Point| plan.only.as_ref().is_none_or(|only| *only == point.name());
    let points: Vec<Point> = points.filter(asked).collect();
    if points.is_empty() {
        let names = Point::ALL.map(Point::name).join(", ");
        return Err(format!("no such point; there are {names}"));
    }
    let mut reached = BTreeMap::new();
    let mut held = true;
    let acts = points.iter().flat_map(|point| works_at(*point).iter().map(|work| (*work, *point)));
    let (alone, others): (Vec<_>, Vec<_>) = acts.partition(|(work, _)| *work == Work::OnlyVoter);
    for (nodes, replicas, acts) in [(5, 3, others), (3, 1, alone)] {
        if !acts.is_empty() {
            held &= rounds(plan, nodes, replicas, &acts, &mut reached).await?;
        }
    }
    println!("\npoints, and how often work came by:");
    for point in points {
        let times = reached.get(&point.name()).copied().unwrap_or(0);
        let verdict = if times > 0 { "" } else { "  NEVER REACHED" };
        println!("{times:>6}: {}{verdict}", point.name());
        held &= times > 0;
    }
    println!("{}", if held { "PASS" } else { "FAIL" });
    Ok(held)
}

/// One cluster, and the rounds on it.
struct Rig {
    cluster: Cluster,
    /// By node: how far its log was read.
    heard: Vec<u64>,
    /// By name: how often a point was reached, over all rounds.
    reached: BTreeMap<String, u64>,
    /// Rounds so far: another shard each time.
    round: usize,
    replicas: usize,
}

async fn rounds(
    plan: &Plan,
    nodes: usize,
    replicas: u32,
    acts: &[(Work, Point)],
    reached: &mut BTreeMap<String, u64>,
) -> Result<bool, String> {
    let cluster = Cluster::start_as(Setup {
        program: plan.program.clone(),
        nodes,
        replicas,
        shards: 4,
        settings: vec![format!("test.hold_steps={}ms", HOLD.as_millis())],
        ..Setup::default()
    });
    let cluster = cluster.await?;
    println!("{nodes} nodes, {replicas} voters a shard");
    moves::by_hand(cluster.client()).await?;
    let client = cluster.client().clone();
    let load = Load::start(&client, 1, WRITE_PAUSE).await?;
    let watch = MapWatch::start(&cluster)?;
    let (heard, replicas) = (vec![0; nodes], replicas as usize);
    let mut rig = Rig { cluster, heard, reached: BTreeMap::new(), round: 0, replicas };
    let mut held = true;
    for (work, point) in acts {
        match work {
            Work::Half if rig.reached.contains_key(&point.name()) => continue,
            Work::Half => held &= rig.halves(*point).await?,
            _ => {
                for victim in &plan.victims {
                    held &= rig.round(*work, *point, *victim).await?;
                }
            }
        }
    }
    let ledger = load.stop().await;
    let lost = ledger.lost(&client).await?;
    let (looks, faults) = watch.stop().await?;
    println!(
        "{looks} maps looked at, {} not as they must be; {} writes lost",
        faults.len(),
        lost.len()
    );
    faults.iter().chain(&lost).take(20).for_each(|line| println!("  {line}"));
    for (point, times) in rig.reached {
        *reached.entry(point).or_default() += times;
    }
    Ok(held && lost.is_empty() && faults.is_empty())
}

impl Rig {
    /// Begins work, kills at a point, and looks at what becomes of it.
    async fn round(&mut self, work: Work, point: Point, victim: Victim) -> Result<bool, String> {
        self.round += 1;
        let began = Instant::now();
        let cast = self.prepare(work).await?;
        let before = moves::settle(self.cluster.client()).await?;
        self.listen()?;
        let id = self.begin(work, cast).await?;
        let hit = self.wait_for(work, point, cast, id).await?;
        let at = match victim {
            Victim::Controller => cast.controller,
            Victim::Source => cast.source,
            Victim::Target => cast.target,
        };
        match hit {
            true => self.strike(at).await?,
            false => self.revive().await?,
        }
        let (ended, mut wrong) = self.aftermath(work, cast, &before, id).await?;
        if !hit {
            wrong.push("the point was not reached".to_owned());
        }
        println!(
            "{:>5}: {:<20} {:<12} n{} killed, {}: {ended}; {:.1} s",
            if wrong.is_empty() { "ok" } else { "WRONG" },
            point.name(),
            format!("{victim:?}").to_lowercase(),
            at + 1,
            cast.told(work),
            began.elapsed().as_secs_f64()
        );
        wrong.iter().for_each(|line| println!("         {line}"));
        Ok(wrong.is_empty())
    }

    /// A leader is killed in the middle of a change of voters, again and again, until it leaves one
    /// half done, and somebody ends it.
    async fn halves(&mut self, point: Point) -> Result<bool, String> {
        let mut good = true;
        for turn in 0..HALVES {
            self.round += 1;
            let cast = self.prepare(Work::Half).await?;
            let before = moves::settle(self.cluster.client()).await?;
            self.listen()?;
            let id = self.begin(Work::Half, cast).await?;
            if !self.wait_for(Work::Half, Point::Promote, cast, id).await? {
                return Ok(false);
            }
            let leaders = self.cluster.leaders().await;
            let leader = leaders.get(&cast.shard).ok_or("nobody leads")?.at;
            tokio::time::sleep(HOLD.saturating_sub(LISTEN * 3) + HALVES_APART * turn).await;
            self.strike(leader).await?;
            let (ended, wrong) = self.aftermath(Work::Half, cast, &before, id).await?;
            self.listen()?;
            good &= wrong.is_empty();
            wrong.iter().for_each(|line| println!("         {line}"));
            let found = self.reached.contains_key(&point.name());
            if found || turn % 10 == 9 || !wrong.is_empty() {
                println!(
                    "{:>5}: {:<20} the leader of shard {} killed, for the {}. time: {ended}",
                    if wrong.is_empty() { "ok" } else { "WRONG" },
                    point.name(),
                    cast.shard,
                    turn + 1
                );
            }
            if found {
                return Ok(good);
            }
        }
        Ok(good)
    }

    /// Who takes part in the next round, on a cluster that is made ready for it.
    async fn prepare(&mut self, work: Work) -> Result<Cast, String> {
        let client = self.cluster.client().clone();
        let map = moves::settle(&client).await?;
        let mut ids = Vec::new();
        for at in 0..self.cluster.len() {
            ids.push(self.cluster.status(at).await?.node.id);
        }
        let pair = match work.is_merge() {
            true => Some(self.neighbours(map, work).await?),
            false => {
                self.room(map).await?;
                None
            }
        };
        let map = moves::settle(&client).await?;
        let leaders = self.cluster.leaders().await;
        let controller = leaders.get(&ShardId(0)).ok_or("nobody leads the meta group")?.at;
        let crew = Crew { ids: &ids, leaders: &leaders, controller, round: self.round };
        match pair {
            Some((left, right)) => crew.of_merge(left, right),
            None if work.is_split() => crew.of_split(&map),
            None => crew.of_move(&map),
        }
    }

    /// Two neighbours that can be merged: on the same nodes, or, where one is to be gathered first, not.
    async fn neighbours(&self, map: ClusterMap, work: Work) -> Result<(ShardId, ShardId), String> {
        let client = self.cluster.client();
        let mut pair = pair_on_the_same_nodes(&map, self.round);
        if pair.is_none() {
            let shards: Vec<ShardId> = moves::arcs(client).await?.into_keys().collect();
            moves::halve(client, shards[self.round % shards.len()]).await?;
            pair = pair_on_the_same_nodes(&moves::settle(client).await?, self.round);
        }
        let (left, right) = pair.ok_or("a split leaves no two shards on the same nodes")?;
        if work == Work::Gather {
            let map = moves::settle(client).await?;
            let holds = moves::placement(&map).remove(&right).unwrap_or_default();
            let to = map.nodes.iter().map(|node| node.id).find(|node| !holds.contains(node));
            let (from, to) = holds.first().copied().zip(to).ok_or("nobody to move to")?;
            let begun = client.admin().move_replica(right, from, to).await;
            let begun = begun.map_err(|error| format!("move a replica away: {error}"))?;
            moves::done(client, begun.id).await?;
        }
        Ok((left, right))
    }

    /// Splits leave shards behind: before there are too many, two become one.
    async fn room(&self, map: ClusterMap) -> Result<(), String> {
        if map.shards.len() <= SHARDS_MAX {
            return Ok(());
        }
        match pair_on_the_same_nodes(&map, self.round) {
            Some((left, right)) => moves::merge(self.cluster.client(), left, right).await,
            None => Ok(()),
        }
    }

    /// Begins. The answer may be lost, with the one who would give it: then the records tell.
    async fn begin(&self, work: Work, cast: Cast) -> Result<Option<OperationId>, String> {
        let admin = self.cluster.client().admin();
        if work == Work::ReadReplicas {
            let set = admin.set_read_replicas("", 1, false).await;
            set.map_err(|error| format!("read replicas: {error}"))?;
            return Ok(None);
        }
        let known = admin.operations().await.map_err(|error| error.to_string())?;
        let last = known.operations.iter().map(|known| known.id).max();
        let asking = admin.clone();
        let asked = tokio::spawn(async move { cast.ask(work, &asking).await });
        let began = Instant::now();
        loop {
            let known = admin.operations().await.map_err(|error| error.to_string())?;
            let new = known.operations.iter().map(|known| known.id).find(|id| Some(*id) > last);
            if new.is_some() {
                return Ok(new);
            }
            if began.elapsed() >= REACH {
                let why = asked.await.map_err(|error| error.to_string())?.err();
                return Err(format!("{work:?} is not recorded: {why:?}"));
            }
            tokio::time::sleep(LISTEN).await;
        }
    }

    /// Waits until a point is reached. Says whether it was.
    async fn wait_for(
        &mut self,
        work: Work,
        point: Point,
        cast: Cast,
        id: Option<OperationId>,
    ) -> Result<bool, String> {
        let began = Instant::now();
        let (mut cancelled, mut seen) = (false, Vec::new());
        let patience = if work == Work::GiveUp { REACH_LATE } else { REACH };
        while began.elapsed() < patience {
            seen.extend(self.listen()?);
            let of_it = |(_, shard): &&(String, u64)| {
                *shard == 0 || *shard == cast.shard.0 || Some(*shard) == cast.right.map(|id| id.0)
            };
            let mine = seen.iter().filter(|seen| work == Work::ReadReplicas || of_it(seen));
            if mine.clone().any(|(name, _)| *name == point.name()) {
                return Ok(true);
            }
            let at = |name: Point| mine.clone().any(|(seen, _)| *seen == name.name());
            let admin = self.cluster.client().admin();
            if !cancelled && work.cancelled_at().is_some_and(at) {
                cancelled = true;
                let cancel = admin.control(id, Control::Cancel).await;
                cancel.map_err(|error| format!("cancel: {error}"))?;
            }
            if work == Work::GiveUp && at(Point::Made) && self.cluster.is_running(cast.target) {
                self.cluster.kill(cast.target)?;
            }
            tokio::time::sleep(LISTEN).await;
        }
        Ok(false)
    }

    /// SIGKILL; it comes back a little later, and so does whoever was away.
    async fn strike(&mut self, at: usize) -> Result<(), String> {
        self.cluster.kill(at)?;
        tokio::time::sleep(AWAY).await;
        self.revive().await
    }

    /// Starts whoever is away.
    async fn revive(&mut self) -> Result<(), String> {
        let away = (0..self.cluster.len()).filter(|at| !self.cluster.is_running(*at));
        for at in away.collect::<Vec<_>>() {
            self.cluster.restart(at)?;
            self.cluster.wait_back(at).await?;
        }
        Ok(())
    }

    /// What must be so when all has come to its end: how that was, and what is wrong.
    async fn aftermath(
        &mut self,
        work: Work,
        cast: Cast,
        before: &ClusterMap,
        id: Option<OperationId>,
    ) -> Result<(String, Vec<String>), String> {
        let client = self.cluster.client().clone();
        if work == Work::ReadReplicas {
            let set = client.admin().set_read_replicas("", 0, false).await;
            set.map_err(|error| format!("no read replicas: {error}"))?;
            self.no_learners().await?;
        }
        let mut wrong = Vec::new();
        let map = match moves::settle(&client).await {
            Ok(map) => map,
            Err(why) => return Ok(("stuck".to_owned(), vec![why])),
        };
        let (now, then) = (moves::placement(&map), moves::placement(before));
        let operation = match id {
            Some(id) => client.admin().operation(id).await.map_err(|error| error.to_string())?,
            None => None,
        };
        let state = operation.as_ref().map(|operation| operation.state);
        let ended = ending(work, cast, state, &then, &now).unwrap_or_else(|| {
            wrong.push(format!("{state:?}, and the voters were {then:?}, are {now:?}"));
            "neither done nor undone"
        });
        let short = now.values().filter(|voters| voters.len() != self.replicas).count();
        if short > 0 {
            wrong.push(format!("{short} shards have not {} voters", self.replicas));
        }
        wrong.extend(learners(&map));
        wrong.extend(moves::left_over(&self.cluster, LEFT_OVER).await?);
        self.listen()?;
        let message = operation.map(|known: ClusterOperation| known.message).unwrap_or_default();
        Ok((
            if message.is_empty() { ended.to_owned() } else { format!("{ended} ({message})") },
            wrong,
        ))
    }

    /// Waits until the map has no read replicas; that some are left, is told by whoever looks next.
    async fn no_learners(&self) -> Result<(), String> {
        let began = Instant::now();
        while began.elapsed() < LEFT_OVER {
            let map = self.cluster.client().admin().map().await;
            if learners(&map.map_err(|error| error.to_string())?).is_none() {
                break;
            }
            tokio::time::sleep(LISTEN).await;
        }
        Ok(())
    }

    /// The points that were reached since it was last asked: name and shard.
    fn listen(&mut self) -> Result<Vec<(String, u64)>, String> {
        let mut found = Vec::new();
        for at in 0..self.cluster.len() {
            let path = self.cluster.log(at);
            let failed = |error: std::io::Error| format!("{}: {error}", path.display());
            let mut file = File::open(path).map_err(failed)?;
            file.seek(SeekFrom::Start(self.heard[at])).map_err(failed)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(failed)?;
            // The last line may still be written.
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            self.heard[at] += whole as u64;
            found.extend(String::from_utf8_lossy(&bytes[..whole]).lines().filter_map(point_of));
        }
        for (name, _) in &found {
            *self.reached.entry(name.clone()).or_default() += 1;
        }
        Ok(found)
    }
}

/// Replicas that neither vote nor should be there.
fn learners(map: &ClusterMap) -> Option<String> {
    let replicas = map.shards.iter().flat_map(|shard| &shard.replicas);
    let count = replicas.filter(|replica| !replica.voter).count();
    (count > 0).then(|| format!("{count} replicas that do not vote are left"))
}

/// The point that a line of a log names, and its shard.
fn point_of(line: &str) -> Option<(String, u64)> {
    let (_, fields) = line.split_once("held between two steps")?;
    let field = |name: &str| {
        let mut fields = fields.split_whitespace();
        fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    let names: BTreeSet<String> = Point::ALL.iter().map(|point| point.name()).collect();
    let name = field("point")?.trim_matches('"').to_owned();
    names.contains(&name).then_some(())?;
    Some((name, field("shard")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_from_lines_of_logs() {
        let line = "2026-01-01T00:00:00Z  WARN coracle_server::cluster::points: held between two \
                    steps point=\"move-begun\" shard=3 replica=17";
        assert_eq!(point_of(line), Some(("move-begun".to_owned(), 3)));
        assert_eq!(point_of("WARN held between two steps point=\"nothing\" shard=3"), None);
        assert_eq!(point_of("WARN something else point=\"move-begun\" shard=3"), None);
    }
}
