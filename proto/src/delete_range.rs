//! Owns how a delete-range request is read against a map: its bounds, whether all of it is of one
//! entity, the token that it goes on with, and what nobody may delete like this. Servers and the
//! client's fake cluster read by the same rules. Does not delete, and does not choose a shard.

use bytes::Bytes;

use crate::entity;
use crate::limits;
use crate::reason::{Fault, Reason, metadata};
use crate::ring::{Arc, Position};
use crate::shard_map::{Keyspace, SYSTEM_KEYSPACE, ShardMap};
use crate::token::{DeleteToken, TokenError};
use crate::v1;

/// A delete-range request whose keys are possible.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The first key.
    pub start: Bytes,
    /// The first key behind the range; `None`: to the last key of the keyspace.
    pub end: Option<Bytes>,
    /// Where all of its keys stand, if they are of one entity.
    pub position: Option<Position>,
    /// The token that it goes on with.
    pub token: Option<DeleteToken>,
}

/// Reads a request. `None` when no key can be in its range.
pub fn read(
    map: &ShardMap,
    keyspace: &Keyspace,
    request: &v1::DeleteRangeRequest,
) -> Result<Option<Asked>, Fault> {
    limits::check_delete_range(request)?;
    let bounds = entity::bounds(&request.start, &request.end, &request.prefix);
    let Some((start, end)) = bounds else { return Ok(None) };
    let entity = keyspace.rule.entity_of_range(&start, end.as_deref().unwrap_or_default());
    check(keyspace, request, entity.is_some())?;
    let position = entity.map(|entity| map.position_of(keyspace, entity));
    let token = token(keyspace, request)?;
    Ok(Some(Asked { start: start.into(), end: end.map(Bytes::from), position, token }))
}

/// The arc of one position.
pub fn arc_of(position: Position) -> Arc {
    let Position(at) = position;
    Arc::new(at, at.wrapping_add(1)).expect("the last position ends at 2^64")
}

fn check(
    keyspace: &Keyspace,
    request: &v1::DeleteRangeRequest,
    is_of_one_entity: bool,
) -> Result<(), Fault> {
    if keyspace.id == SYSTEM_KEYSPACE {
        let message = "the cluster's own records are deleted one by one";
        return Err(Fault::new(Reason::NotAllowed, message));
    }
    if request.atomic && !is_of_one_entity {
        let message = format!(
            "the range may hold several entities of keyspace {}: name a prefix of one, or delete it in steps, without atomic",
            keyspace.name
        );
        return Err(Fault::new(Reason::CrossEntity, message)
            .with(metadata::KEYSPACE, &keyspace.name)
            .with(metadata::FIELD, "atomic"));
    }
    if request.atomic && !request.resume_token.is_empty() {
        let message = "an atomic delete-range is done at once: it is never gone on with";
        return Err(Fault::invalid("resume_token", message));
    }
    Ok(())
}

fn token(
    keyspace: &Keyspace,
    request: &v1::DeleteRangeRequest,
) -> Result<Option<DeleteToken>, Fault> {
    if request.resume_token.is_empty() {
        return Ok(None);
    }
    let invalid = |error: TokenError| Fault::invalid("resume_token", error.to_string());
    let token = DeleteToken::decode(&request.resume_token).map_err(invalid)?;
    token.check(request, keyspace.id).map_err(invalid)?;
    Ok(Some(token))
}

impl Asked {
    /// The token of a step, which goes on in one arc and under a version that was fixed; of an atomic
    /// request there is none.
    pub fn lane(&self, request: &v1::DeleteRangeRequest) -> Result<Option<DeleteToken>, Fault> {
        match &self.token {
            _ if request.atomic => Ok(None),
            Some(token) if token.lanes.len() == 1 && token.rest.is_none() => {
                Ok(Some(token.clone()))
            }
            Some(_) => {
                let message = "a step is of one arc: this token is of a delete-range over several";
                Err(Fault::invalid("resume_token", message))
            }
            None => {
                let message = "a step goes on with a token: call DeleteRange for one";
                Err(Fault::invalid("resume_token", message))
            }
        }
    }

    /// Where a call stands: at its token, or before its first step. `arc_of_shard` is asked for the arc
    /// of the only shard that the request names. That of an atomic request says nothing.
    pub fn begun(
        self,
        keyspace: &Keyspace,
        request: &v1::DeleteRangeRequest,
        arc_of_shard: impl FnOnce(v1::Route) -> Result<Arc, Fault>,
    ) -> Result<DeleteToken, Fault> {
        if let Some(token) = self.token {
            return Ok(token);
        }
        let route = request.only_shard.filter(|route| route.shard != 0 && !request.atomic);
        let arc = match (self.position, route) {
            (Some(position), _) => Some(arc_of(position)),
            (None, Some(route)) => Some(arc_of_shard(route)?),
            (None, None) => None,
        };
        Ok(match arc {
            Some(arc) => DeleteToken::of_arc(request, keyspace.id, arc),
            None => DeleteToken::begin(request, keyspace.id),
        })
    }
}
