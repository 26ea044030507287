//! Owns the gRPC face of the cluster service: the cached map, its changes, the keyspaces. Serves from
//! the cache, also without quorum; only changing keyspaces needs the meta group (see [`Keyspaces`]).

use std::sync::Arc;

use coracle_proto::entity::EntityRule;
use coracle_proto::limits;
use coracle_proto::reason::{Fault, Reason};
use coracle_proto::shard_map::{SYSTEM_KEYSPACE_NAME, ShardMap};
use coracle_proto::v1;
use coracle_proto::v1::cluster_service_server::ClusterService;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::admission::Call;
use crate::router::Router;

/// Changes the cluster's keyspaces.
pub trait Keyspaces: Send + Sync + 'static {
    /// Creates a keyspace from a checked request; one that stands already with the same settings is
    /// no error. With `validate_only` nothing is written.
    fn create(
        &self,
        request: v1::CreateKeyspaceRequest,
        call: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>>;

    /// Changes a keyspace's settings by a checked request; one that has them already is no error. With
    /// `validate_only` nothing is written.
    fn update(
        &self,
        request: v1::UpdateKeyspaceRequest,
        call: Call,
    ) -> BoxFuture<'static, Result<v1::Keyspace, Fault>>;
}

/// The cluster service of a node.
#[derive(Clone)]
pub struct ClusterFacts {
    router: Arc<Router>,
    keyspaces: Arc<dyn Keyspaces>,
}

impl ClusterFacts {
    /// The service over a router's map.
    pub fn new(router: Arc<Router>, keyspaces: Arc<dyn Keyspaces>) -> ClusterFacts {
        ClusterFacts { router, keyspaces }
    }

    fn map(&self) -> Result<v1::ShardMap, Fault> {
        Ok(timed(&self.router, &*self.router.current_map()?))
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterFacts {
    type WatchMapStream = BoxStream<'static, Result<v1::WatchMapResponse, Status>>;

    async fn watch_map(
        &self,
        request: Request<v1::WatchMapRequest>,
    ) -> Result<Response<Self::WatchMapStream>, Status> {
        let (router, from_epoch) = (self.router.clone(), request.into_inner().from_epoch);
        let follower = Follower { changes: router.map().watch(), router, from_epoch, sent: None };
        let draining = self.router.admission().draining().clone().cancelled_owned();
        let maps = stream::unfold(follower, |mut follower| async move {
            let map = follower.next().await?;
            Some((Ok(v1::WatchMapResponse { map: Some(map) }), follower))
        });
        Ok(Response::new(maps.take_until(draining).boxed()))
    }

    async fn get_map(
        &self,
        _: Request<v1::GetMapRequest>,
    ) -> Result<Response<v1::GetMapResponse>, Status> {
        Ok(Response::new(v1::GetMapResponse { map: Some(self.map()?) }))
    }

    async fn list_keyspaces(
        &self,
        _: Request<v1::ListKeyspacesRequest>,
    ) -> Result<Response<v1::ListKeyspacesResponse>, Status> {
        let mut keyspaces = self.map()?.keyspaces;
        keyspaces.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::ListKeyspacesResponse { keyspaces }))
    }

    async fn create_keyspace(
        &self,
        request: Request<v1::CreateKeyspaceRequest>,
    ) -> Result<Response<v1::CreateKeyspaceResponse>, Status> {
        let call = Call::from_metadata(request.metadata())?;
        let request = request.into_inner();
        check(&request)?;
        self.router.current_map()?;
        let _permit = self.router.admission().admit(0, call.origin)?;
        let keyspace = self.keyspaces.create(request, call).await?;
        Ok(Response::new(v1::CreateKeyspaceResponse { keyspace: Some(keyspace) }))
    }

    async fn update_keyspace(
        &self,
        request: Request<v1::UpdateKeyspaceRequest>,
    ) -> Result<Response<v1::UpdateKeyspaceResponse>, Status> {
        let call = Call::from_metadata(request.metadata())?;
        let request = request.into_inner();
        check_update(&request)?;
        self.router.current_map()?;
        let _permit = self.router.admission().admit(0, call.origin)?;
        let keyspace = self.keyspaces.update(request, call).await?;
        Ok(Response::new(v1::UpdateKeyspaceResponse { keyspace: Some(keyspace) }))
    }
}

/// One caller that follows the map.
struct Follower {
    router: Arc<Router>,
    changes: watch::Receiver<u64>,
    from_epoch: u64,
    /// What the caller has: shared with the cache until that moves on.
    sent: Option<Arc<ShardMap>>,
}

impl Follower {
    /// The first map that the caller wants, then every one that differs from the last; what changed
    /// while the caller was not looking melts into one.
    async fn next(&mut self) -> Option<v1::ShardMap> {
        loop {
            self.changes.borrow_and_update();
            if let Some(map) = self.router.map().current() {
                let wanted = match &self.sent {
                    None => self.from_epoch == 0 || map.epoch().0 > self.from_epoch,
                    Some(sent) => !Arc::ptr_eq(sent, &map),
                };
                // From now on leader hints are news too, of a map that the caller has.
                self.sent = Some(map.clone());
                if wanted {
                    return Some(timed(&self.router, &map));
                }
            }
            self.changes.changed().await.ok()?;
        }
    }
}

/// The map as it travels, with the time for the births of a client's first writes.
fn timed(router: &Router, map: &ShardMap) -> v1::ShardMap {
    v1::ShardMap { server_time_ms: router.now_ms(), ..map.to_proto() }
}

/// What is wrong with a new keyspace whatever keyspaces there are.
fn check(request: &v1::CreateKeyspaceRequest) -> Result<(), Fault> {
    limits::check_keyspace_name(&request.name)?;
    limits::check_history(request.history_ms)?;
    let rule = EntityRule::from_request(request.entity_rule.as_ref());
    rule.map(drop).map_err(|error| Fault::invalid("entity_rule", error.to_string()))
}

/// What is wrong with a change whatever keyspaces there are.
fn check_update(request: &v1::UpdateKeyspaceRequest) -> Result<(), Fault> {
    limits::check_keyspace_name(&request.name)?;
    limits::check_history(request.history_ms)?;
    if request.name == SYSTEM_KEYSPACE_NAME {
        let message = "the keyspace system is the cluster's own";
        return Err(Fault::new(Reason::NotAllowed, message));
    }
    if !request.has_history && request.history_ms == 0 {
        return Err(Fault::invalid("history_ms", "the request names no setting to change"));
    }
    Ok(())
}
