//! What a plan is made from, and what it says: nodes, shards, settings; steps, spread, stalls.
//!
//! Owns the words of placement, and the world as it is after a plan ([`View::after`]). Decides nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use coracle_proto::shard_map::{Epoch, NodeId, NodeState, ReplicaId, ShardId};

/// The weight of a node like any other.
pub const WEIGHT_ONE: u16 = 1_000;

/// What a node is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Duty {
    /// Holds, takes and leads.
    Serves,
    /// What it holds stays; it takes nothing and leads nothing, as one that restarts soon.
    Keeps,
    /// [`Duty::Keeps`], and it does not answer: what it leads, others lead by now.
    Absent,
    /// All that it holds goes elsewhere; it still counts for quorums.
    Leaves,
    /// It will not come back: all that it held is made anew, from others.
    Lost,
}

impl Duty {
    /// The duty of a state. Two things only the caller knows, and raises: a node that is *down* past
    /// its grace is [`Duty::Lost`], one that is to be decommissioned [`Duty::Leaves`] before it is.
    pub fn of(state: NodeState) -> Duty {
        match state {
            NodeState::Active => Duty::Serves,
            NodeState::Unspecified | NodeState::Joining | NodeState::Draining => Duty::Keeps,
            NodeState::Down => Duty::Absent,
            NodeState::Decommissioning | NodeState::Decommissioned => Duty::Leaves,
            NodeState::Gone => Duty::Lost,
        }
    }
}

/// Room on a node's disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// All of it.
    pub capacity: u64,
    /// What is taken, by whomever.
    pub used: u64,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// Its id.
    pub id: NodeId,
    /// Its failure domain.
    pub zone: String,
    /// Its share beside others, [`WEIGHT_ONE`] for an ordinary one; 0 counts as 1. Whole numbers of 16
    /// bits: shares of two nodes are then compared without rounding.
    pub weight: u16,
    /// What it is good for.
    pub duty: Duty,
    /// `None`: not known, and not a limit.
    pub disk: Option<Disk>,
}

/// A replica and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seat {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
}

/// A shard, the meta group among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardView {
    /// Its id.
    pub id: ShardId,
    /// Who votes; no node twice.
    pub voters: Vec<Seat>,
    /// Where read replicas are, or are going to be: no voter comes there.
    pub learners: Vec<NodeId>,
    /// Who leads; `None` where nobody knows.
    pub leader: Option<NodeId>,
    /// What a copy takes.
    pub bytes: u64,
    /// What it gives its leader to do, in any unit: requests per second, say.
    pub load: u64,
}

/// Everything that a plan is made from, beside [`Settings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Of the shard map that this was taken from.
    pub epoch: Epoch,
    /// The nodes.
    pub nodes: Vec<NodeView>,
    /// The shards.
    pub shards: Vec<ShardView>,
}

/// How far a plan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Only what must move: replicas that are lacking, or on nodes that leave or are lost.
    Repair,
    /// Zones and balance too.
    Balance,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Voters of a shard; 0 counts as 1.
    pub replicas: usize,
    /// How far to go.
    pub goal: Goal,
    /// Zones where leaders stand if they can; empty: anywhere.
    pub leader_zones: Vec<String>,
    /// How full a disk may get by moves, in thousandths.
    pub fill_max: u32,
    /// Of a large disk that rest is more than anybody needs: so much free is always enough.
    pub free_enough: u64,
    /// How far above its share of bytes a node may be, in thousandths of that share, before replicas
    /// move for nothing else.
    pub bytes_slack: u32,
    /// [`Settings::bytes_slack`] in bytes: less is not worth a move.
    pub bytes_gap: u64,
    /// How far a node may be from its share of load, in thousandths of that share, before leaders go.
    pub load_slack: u32,
    /// [`Settings::load_slack`] in units of load. A cluster with less than this balances leaders by count.
    pub load_gap: u64,
    /// What one move copies in a second.
    pub bytes_per_second: u64,
    /// Moves at a time.
    pub moves_at_a_time: usize,
    /// What a move takes beside copying.
    pub move_overhead: Duration,
}

impl Settings {
    /// Voters of a shard.
    pub fn voters(&self) -> usize {
        self.replicas.max(1)
    }

    /// How many bytes a disk may hold.
    pub fn limit(&self, disk: Disk) -> u64 {
        let part = u128::from(disk.capacity) * u128::from(self.fill_max) / 1_000;
        let part = u64::try_from(part).unwrap_or(u64::MAX);
        part.max(disk.capacity.saturating_sub(self.free_enough))
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            replicas: 3,
            goal: Goal::Balance,
            leader_zones: Vec::new(),
            // Compaction and checkpoints need the rest.
            fill_max: 850,
            free_enough: u64::MAX,
            bytes_slack: 200,
            bytes_gap: 1 << 30,
            load_slack: 200,
            load_gap: 100,
            bytes_per_second: 32 << 20,
            moves_at_a_time: 4,
            move_overhead: Duration::from_secs(1),
        }
    }
}

/// Why a replica moves; the first is the most urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// Its shard has fewer than it should.
    Lacking,
    /// Its node leaves.
    Leaving,
    /// Its shard stands in fewer zones than it could.
    Zones,
    /// Another node has less.
    Balance,
    /// Its shard has more than it should.
    Surplus,
}

/// One change of a shard's voters: `to` is added and caught up, then `from` leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// Who goes; `None`: nobody.
    pub from: Option<Seat>,
    /// Where a new replica comes, under a fresh id; `None`: nowhere.
    pub to: Option<NodeId>,
    /// When `from` leads: who leads before it goes. Votes by then.
    pub hand_over: Option<NodeId>,
    /// What is copied; 0 without `to`.
    pub bytes: u64,
    /// The reason.
    pub why: Why,
}

/// One leadership that goes from voter to voter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// The shard.
    pub shard: ShardId,
    /// Who leads.
    pub from: NodeId,
    /// Who shall.
    pub to: NodeId,
}

/// A part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A replica.
    Move(Move),
    /// A leadership.
    Transfer(Transfer),
}

/// Where a shard stands when a plan is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Who votes, by node id.
    pub voters: Vec<NodeId>,
    /// Who leads; `None` only where nobody can.
    pub leader: Option<NodeId>,
}

/// What the node that has most beside its weight has, in thousandths of its fair share: 1,000 is even.
/// Nodes that serve count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    /// Of replicas.
    pub replicas: u64,
    /// Of bytes.
    pub bytes: u64,
    /// Of leaders.
    pub leaders: u64,
    /// Of the load of leaders.
    pub load: u64,
}

/// Something that ought to be done and cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stall {
    /// Shards get fewer replicas than they should: so few nodes may hold them.
    TooFewNodes {
        /// How many a shard should have.
        wanted: usize,
        /// How many the worst of them can.
        possible: usize,
        /// How many shards.
        shards: usize,
    },
    /// Replicas go nowhere: where they could, disks would get too full.
    DisksFull {
        /// How many shards.
        shards: usize,
        /// The limit, in thousandths.
        fill_max: u32,
        /// Nodes without room, and how full they are, in thousandths.
        nodes: Vec<(NodeId, u64)>,
    },
    /// A node still holds what should go.
    NotEmptied {
        /// The node.
        node: NodeId,
        /// How many replicas.
        replicas: usize,
    },
    /// Half of the voters or more are lost: the group cannot change its members.
    QuorumLost {
        /// The shard.
        shard: ShardId,
    },
    /// No voter of it is on a node that may lead.
    NobodyLeads {
        /// How many shards.
        shards: usize,
    },
}

/// What to do, in order, and what comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The map that it holds for; on any other it is void.
    pub epoch: Epoch,
    /// Every shard, as it is afterwards.
    pub wanted: BTreeMap<ShardId, Placed>,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// What all moves copy.
    pub bytes: u64,
    /// How long it takes, by the rates of [`Settings`].
    pub estimate: Duration,
    /// As it is.
    pub before: Spread,
    /// As it will be.
    pub after: Spread,
    /// No plan to a placement as good by zones and counts copies fewer replicas.
    pub lower_bound: usize,
    /// Replicas copied beyond that for an even share of bytes or load.
    pub for_bytes: usize,
    /// What remains undone.
    pub stalls: Vec<Stall>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The changes of voters, in order.
    pub fn moves(&self) -> impl Iterator<Item = &Move> {
        self.steps.iter().filter_map(|step| match step {
            Step::Move(change) => Some(change),
            Step::Transfer(_) => None,
        })
    }

    /// The leaderships that go without a move, in order.
    pub fn transfers(&self) -> impl Iterator<Item = &Transfer> {
        self.steps.iter().filter_map(|step| match step {
            Step::Transfer(transfer) => Some(transfer),
            Step::Move(_) => None,
        })
    }

    /// Replicas that are copied: the number that [`Plan::lower_bound`] is about.
    pub fn copies(&self) -> usize {
        self.moves().filter(|change| change.to.is_some()).count()
    }
}

impl View {
    /// The node, when it is known.
    pub fn node(&self, id: NodeId) -> Option<&NodeView> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The world after a plan: fresh replica ids, a higher epoch, disks as they are then.
    pub fn after(&self, plan: &Plan) -> View {
        let mut view = self.clone();
        view.epoch.0 += 1;
        let seats = self.shards.iter().flat_map(|shard| &shard.voters);
        let mut next = seats.map(|seat| seat.replica.0).max().unwrap_or(0);
        let places: BTreeMap<ShardId, usize> =
            view.shards.iter().enumerate().map(|(at, shard)| (shard.id, at)).collect();
        for step in &plan.steps {
            match step {
                Step::Transfer(transfer) => {
                    view.shards[places[&transfer.shard]].leader = Some(transfer.to);
                }
                Step::Move(change) => {
                    let shard = &mut view.shards[places[&change.shard]];
                    if let Some(node) = change.to {
                        next += 1;
                        shard.voters.push(Seat { replica: ReplicaId(next), node });
                    }
                    if let Some(from) = change.from {
                        shard.voters.retain(|seat| *seat != from);
                        if shard.leader == Some(from.node) {
                            shard.leader = change.hand_over;
                        }
                    }
                    let bytes = shard.bytes;
                    view.fill(change, bytes);
                }
            }
        }
        view
    }

    fn fill(&mut self, change: &Move, bytes: u64) {
        for node in &mut self.nodes {
            let Some(disk) = &mut node.disk else { continue };
            if change.to == Some(node.id) {
                disk.used = disk.used.saturating_add(bytes);
            }
            if change.from.is_some_and(|from| from.node == node.id) {
                disk.used = disk.used.saturating_sub(bytes);
            }
        }
    }
}

/// `850` as `85 %`.
struct Percent(u64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 10 {
            0 => write!(f, "{} %", self.0 / 10),
            tenths => write!(f, "{}.{tenths} %", self.0 / 10),
        }
    }
}

/// What it is, and what would help.
impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stall::TooFewNodes { wanted, possible, shards } => write!(
                f,
                "{shards} shards get fewer than {wanted} replicas: only {possible} nodes may hold them. Add nodes"
            ),
            Stall::DisksFull { shards, fill_max, nodes } => {
                write!(f, "{shards} shards wait for room:")?;
                for (at, (node, fill)) in nodes.iter().enumerate() {
                    let comma = if at == 0 { "" } else { "," };
                    write!(f, "{comma} the disk of n{node} is {} full", Percent(*fill))?;
                }
                let limit = Percent(u64::from(*fill_max));
                write!(f, " (the limit is {limit}). Add nodes or disks")
            }
            Stall::NotEmptied { node, replicas } => write!(
                f,
                "n{node} still holds {replicas} replicas: no other node can take them. Add nodes"
            ),
            Stall::QuorumLost { shard } => write!(
                f,
                "shard {shard} has lost its quorum: its members cannot change before a majority is back"
            ),
            Stall::NobodyLeads { shards } => {
                write!(f, "{shards} shards have no voter on a node that may lead")
            }
        }
    }
}
