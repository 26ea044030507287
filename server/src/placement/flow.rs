//! The best assignment there is, from whichever one to begin with.
//!
//! Seats of items on nodes are a flow: from items through their zones and nodes to a sink whose cost per
//! node only grows. A flow is the cheapest exactly when no ring of exchanges has a cost below zero:
//! a seat goes from one node to the next, there another item's seat goes on, and so on; a ring through
//! the sink changes how many seats its two neighbours have. So rings are looked for and carried out until
//! there is none. What comes of it is the least cost, not merely a local one: fewest pairs in zones, then
//! best balance, then fewest moves (`assignment`), as the tests compare with exhaustive search.
//!
//! Only nodes and the sink are vertices: of all items that could go from one node to another the best one
//! stands for the edge. So a search costs nodes², not shards.
//!
//! A disk's limit is a condition on each exchange by itself: what comes must fit before anything leaves.
//! Then the end depends on the placement alone, so that carrying it out leaves nothing to do; but it
//! need not be the least cost.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::assignment::Assignment;

/// An edge that nothing can go along.
const NONE: i128 = i128::MAX / 4;

/// How far each node is from the sink and all others; proves that there is nothing better.
pub(super) struct Proof {
    distance: Vec<i128>,
}

/// Fills, exchanges until nothing is better, and says why nothing is.
pub(super) fn settle(assignment: &mut Assignment) -> Proof {
    assignment.fill();
    loop {
        let mut search = Search::new(assignment);
        search.single_moves();
        let proof = search.rings();
        // Room may have come about.
        if !assignment.fill() {
            return proof;
        }
    }
}

impl Proof {
    /// Between how few and how many seats a node has in the assignments that are as good by all but moves.
    /// For [`super::model::Goal::Balance`].
    pub(super) fn seats(&self, assignment: &Assignment, node: usize) -> (u64, u64) {
        let count = assignment.count[node];
        let part = Assignment::without_moves;
        let sink = self.distance.len() - 1;
        let ahead = part(self.distance[node]) - part(self.distance[sink]);
        // Complementary slackness: what costs more than the distances say is in no best assignment.
        let more = part(assignment.up(node)) + ahead == 0;
        let fewer = count > assignment.nodes[node].base && part(assignment.down(node)) - ahead == 0;
        (count - u64::from(fewer), count + u64::from(more))
    }
}

struct Search<'a> {
    all: &'a mut Assignment,
    nodes: usize,
    /// By edge: exchanges that were possible at some time, the best first, as rank and item.
    waiting: Vec<BinaryHeap<Reverse<u64>>>,
    /// By edge: the best exchange's cost, and its item.
    cost: Vec<i128>,
    item: Vec<usize>,
    /// By node: the least bytes of an item that was refused for want of room.
    refused: Vec<u64>,
}

impl<'a> Search<'a> {
    fn new(all: &'a mut Assignment) -> Search<'a> {
        let nodes = all.nodes.len();
        let edges = nodes * nodes;
        let mut waiting: Vec<Vec<Reverse<u64>>> = vec![Vec::new(); edges];
        for item in 0..all.items.len() {
            for a in &all.items[item].on {
                for b in (0..nodes).filter(|b| all.admits(item, *b)) {
                    waiting[a * nodes + b].push(Reverse(all.rank(item, *a, b) << 32 | item as u64));
                }
            }
        }
        let mut search = Search {
            all,
            nodes,
            waiting: waiting.into_iter().map(BinaryHeap::from).collect(),
            cost: vec![NONE; edges],
            item: vec![0; edges],
            refused: vec![u64::MAX; nodes],
        };
        for edge in 0..edges {
            search.refresh(edge / nodes, edge % nodes);
        }
        search
    }

    /// Finds the best exchange of an edge anew.
    fn refresh(&mut self, a: usize, b: usize) {
        let edge = a * self.nodes + b;
        self.cost[edge] = NONE;
        while let Some(Reverse(first)) = self.waiting[edge].peek() {
            let (rank, item) = (first >> 32, (first & u64::from(u32::MAX)) as usize);
            let stands = self.all.items[item].on.contains(&a)
                && self.all.admits(item, b)
                && self.all.rank(item, a, b) == rank;
            if stands && self.all.fits(item, b) {
                self.cost[edge] = self.all.exchange(item, a, b);
                self.item[edge] = item;
                return;
            }
            if stands {
                self.all.refused = true;
                self.refused[b] = self.refused[b].min(self.all.items[item].bytes);
            }
            self.waiting[edge].pop();
        }
    }

    fn wait(&mut self, item: usize, a: usize, b: usize) {
        if self.all.admits(item, b) {
            let entry = self.all.rank(item, a, b) << 32 | item as u64;
            self.waiting[a * self.nodes + b].push(Reverse(entry));
        }
    }

    /// Carries an exchange out.
    fn exchange(&mut self, item: usize, a: usize, b: usize) {
        self.all.exchange_seat(item, a, b);
        for from in self.all.items[item].on.clone() {
            for to in 0..self.nodes {
                self.wait(item, from, to);
                self.refresh(from, to);
            }
        }
        (0..self.nodes).for_each(|to| self.refresh(a, to));
        for node in [a, b] {
            if self.all.nodes[node].disk.is_some() {
                self.room_changed(node);
            }
        }
    }

    fn room_changed(&mut self, node: usize) {
        let refused = self.refused[node];
        let fits = self.all.nodes[node].disk.is_some_and(|disk| disk.fits(refused));
        if refused != u64::MAX && fits {
            self.refused[node] = u64::MAX;
            for item in 0..self.all.items.len() {
                for from in self.all.items[item].on.clone() {
                    self.wait(item, from, node);
                }
            }
        }
        (0..self.nodes).for_each(|from| self.refresh(from, node));
    }

    /// The rings of three, from the best one on: nearly all there is to do, and found the fastest.
    fn single_moves(&mut self) {
        loop {
            let down: Vec<i128> = (0..self.nodes).map(|node| self.down(node)).collect();
            let up: Vec<i128> = (0..self.nodes).map(|node| self.up(node)).collect();
            let mut best = (0, 0, 0);
            for a in (0..self.nodes).filter(|a| down[*a] != NONE) {
                for (b, up) in up.iter().enumerate() {
                    let cost = self.cost[a * self.nodes + b];
                    if cost != NONE && *up != NONE && down[a] + cost + up < best.0 {
                        best = (down[a] + cost + up, a, b);
                    }
                }
            }
            let (cost, a, b) = best;
            if cost == 0 {
                return;
            }
            self.exchange(self.item[a * self.nodes + b], a, b);
        }
    }

    fn up(&self, node: usize) -> i128 {
        if self.all.nodes[node].open { self.all.up(node) } else { NONE }
    }

    fn down(&self, node: usize) -> i128 {
        let place = &self.all.nodes[node];
        let some = place.open && self.all.count[node] > place.base;
        if some { self.all.down(node) } else { NONE }
    }

    /// The cost of an edge; the sink comes after the nodes.
    fn edge(&self, from: usize, to: usize) -> i128 {
        match (from == self.nodes, to == self.nodes) {
            (true, true) => NONE,
            (true, false) => self.down(to),
            (false, true) => self.up(from),
            (false, false) => self.cost[from * self.nodes + to],
        }
    }

    /// Carries rings out until there is none.
    fn rings(&mut self) -> Proof {
        loop {
            match self.ring() {
                Ok(ring) => self.carry_out(ring),
                Err(proof) => return proof,
            }
        }
    }

    /// A ring whose cost is below zero (Bellman and Ford), or the proof that there is none.
    fn ring(&self) -> Result<Vec<usize>, Proof> {
        let vertices = self.nodes + 1;
        let mut distance = vec![0_i128; vertices];
        let mut before = vec![usize::MAX; vertices];
        let down: Vec<i128> = (0..self.nodes).map(|node| self.down(node)).collect();
        loop {
            let mut nearer = false;
            for from in 0..vertices {
                let costs = match from == self.nodes {
                    true => &down[..],
                    false => &self.cost[from * self.nodes..(from + 1) * self.nodes],
                };
                let here = distance[from];
                for (to, cost) in costs.iter().enumerate() {
                    if *cost != NONE && here + cost < distance[to] {
                        (distance[to], before[to], nearer) = (here + cost, from, true);
                    }
                }
                let cost = if from < self.nodes { self.up(from) } else { NONE };
                if cost != NONE && here + cost < distance[self.nodes] {
                    (distance[self.nodes], before[self.nodes], nearer) = (here + cost, from, true);
                }
            }
            if !nearer {
                return Err(Proof { distance });
            }
            // A ring among those that each vertex was reached from: its cost is below zero.
            if let Some(ring) = ring_of(&before) {
                return Ok(ring);
            }
        }
    }

    /// Carries a ring of vertices out, or a part of it.
    fn carry_out(&mut self, mut ring: Vec<usize>) {
        let mut items: Vec<usize> = Vec::with_capacity(ring.len());
        for (at, from) in ring.iter().enumerate() {
            let to = ring[(at + 1) % ring.len()];
            let real = *from != self.nodes && to != self.nodes;
            items.push(if real { self.item[from * self.nodes + to] } else { usize::MAX });
        }
        // An item whose seats change zones twice: each is priced as if the other did not. The ring
        // passes that item twice and so falls into two, one of which costs less than nothing.
        while let Some((i, j)) = self.twice(&ring, &items) {
            let inner: Vec<usize> = ring.drain(i + 1..=j).collect();
            // Both go on with the same item: the outer one from i to the head of j, the inner one from j
            // to the head of i.
            let inner_items: Vec<usize> = items.drain(i + 1..=j).collect();
            if self.price(&inner, &inner_items) < 0 {
                (ring, items) = (inner, inner_items);
            }
        }
        assert!(self.price(&ring, &items) < 0, "a ring that is carried out makes things better");
        for (at, item) in items.iter().enumerate() {
            if *item != usize::MAX {
                self.exchange(*item, ring[at], ring[(at + 1) % ring.len()]);
            }
        }
    }

    fn twice(&self, ring: &[usize], items: &[usize]) -> Option<(usize, usize)> {
        let zone = |at: usize| self.all.nodes[ring[at % ring.len()]].zone;
        let crosses = |at: usize| items[at] != usize::MAX && zone(at) != zone(at + 1);
        (0..ring.len()).filter(|i| crosses(*i)).find_map(|i| {
            let same = |j: &usize| items[*j] == items[i] && crosses(*j);
            (i + 1..ring.len()).find(same).map(|j| (i, j))
        })
    }

    fn price(&self, ring: &[usize], items: &[usize]) -> i128 {
        let edge = |at: usize| {
            let (from, to) = (ring[at], ring[(at + 1) % ring.len()]);
            match items[at] {
                usize::MAX => self.edge(from, to),
                item => self.all.exchange(item, from, to),
            }
        };
        (0..ring.len()).map(edge).sum()
    }
}

/// A ring among the vertices that others were reached from, in the order of its edges.
fn ring_of(before: &[usize]) -> Option<Vec<usize>> {
    let mut seen = vec![usize::MAX; before.len()];
    for start in 0..before.len() {
        let mut at = start;
        while at != usize::MAX && seen[at] == usize::MAX {
            seen[at] = start;
            at = before[at];
        }
        if at != usize::MAX && seen[at] == start {
            let mut ring = vec![at];
            let mut back = before[at];
            while back != at {
                ring.push(back);
                back = before[back];
            }
            ring.reverse();
            return Some(ring);
        }
    }
    None
}
