//! A wire that speaks Kafka, and stands for a broker that is becoming leader of a partition: the first Produce request
//! is refused, and the second, which was on its way already, is taken.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kafka_protocol::{
    messages::{
        ApiKey, ProduceRequest, ProduceResponse, RequestHeader, ResponseHeader, TopicName,
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::{Decodable, Encodable, HeaderVersion, decode_request_header_from_buffer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use crate::protocol::{read_frame, write_frame};

/// NOT_LEADER_OR_FOLLOWER.
const NOT_LEADER: i16 = 6;
/// How long the second request is waited for, before the first is passed on as if nothing were. Less than a client tries.
const HELD: Duration = Duration::from_secs(5);

/// At once, on one connection: a client has five requests under way there, and the second must be among them.
const MOST_HELD: usize = 2;

/// A partition of a topic.
type Place = (TopicName, i32);

/// Passes requests on. The first Produce request of each partition, and the first after `rest` without any, waits for
/// the second: then it is refused, and the second goes on. Ends with the client.
pub async fn pass_requests(
    mut client: impl AsyncReadExt + Unpin + Send + 'static,
    mut server: impl AsyncWriteExt + Unpin,
    refusals: mpsc::UnboundedSender<Vec<u8>>,
    rest: Duration,
) -> io::Result<()> {
    let (sender, mut requests) = mpsc::unbounded_channel();
    // Reading a frame can't be broken off in its middle, so a task of its own does it.
    let reading = tokio::spawn(async move {
        while let Ok(frame) = read_frame(&mut client).await {
            if sender.send(frame).is_err() {
                return;
            }
        }
    });
    let _reading = AbortOnDropHandle::new(reading);
    let mut last: BTreeMap<Place, Instant> = BTreeMap::new();
    let mut held: VecDeque<Held> = VecDeque::new();
    loop {
        let until = held.front().map_or_else(|| Instant::now() + HELD, |held| held.until);
        let request = match timeout_at(until, requests.recv()).await {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(_) => {
                if let Some(alone) = held.pop_front() {
                    write_frame(&mut server, &alone.request).await?;
                }
                continue;
            }
        };
        let (places, now) = (places_of(&request), Instant::now());
        let is_first = |place: &Place| last.get(place).is_none_or(|&last| now >= last + rest);
        let first = !places.is_empty() && places.iter().all(is_first);
        last.extend(places.iter().map(|place| (place.clone(), now)));
        if let Some(at) = held.iter().position(|held| !held.places.is_disjoint(&places)) {
            let _ = refusals.send(refusal(&held.remove(at).expect("it is there").request));
        } else if first && held.len() < MOST_HELD {
            held.push_back(Held { request, places, until: now + HELD });
            continue;
        }
        write_frame(&mut server, &request).await?;
    }
}

/// A first request that waits for the second.
struct Held {
    request: Vec<u8>,
    places: BTreeSet<Place>,
    until: Instant,
}

/// Passes responses on, and refusals among them.
pub async fn pass_responses(
    mut server: impl AsyncReadExt + Unpin + Send + 'static,
    mut client: impl AsyncWriteExt + Unpin,
    mut refusals: mpsc::UnboundedReceiver<Vec<u8>>,
    refused: &AtomicU64,
) -> io::Result<()> {
    let (sender, mut responses) = mpsc::unbounded_channel();
    let reading = tokio::spawn(async move {
        while let Ok(frame) = read_frame(&mut server).await {
            if sender.send(frame).is_err() {
                return;
            }
        }
    });
    let _reading = AbortOnDropHandle::new(reading);
    loop {
        let frame = tokio::select! {
            // A refusal is there before what it refused for has been passed on.
            biased;
            Some(refusal) = refusals.recv() => {
                refused.fetch_add(1, Ordering::SeqCst);
                refusal
            }
            response = responses.recv() => match response {
                Some(response) => response,
                None => return Ok(()),
            },
        };
        write_frame(&mut client, &frame).await?;
    }
}

/// Where a request wants to write; nowhere, unless it is a Produce request.
fn places_of(request: &[u8]) -> BTreeSet<Place> {
    let Some((_, produce)) = produce(request) else { return BTreeSet::new() };
    let places = produce
        .topic_data
        .iter()
        .flat_map(|topic| topic.partition_data.iter().map(|partition| (topic.name.clone(), partition.index)));
    places.collect()
}

fn produce(request: &[u8]) -> Option<(RequestHeader, ProduceRequest)> {
    if request.get(..2)? != (ApiKey::Produce as i16).to_be_bytes() {
        return None;
    }
    let mut rest = request;
    let header = decode_request_header_from_buffer(&mut rest).expect("a header");
    let produce = ProduceRequest::decode(&mut rest, header.request_api_version).expect("a Produce request");
    Some((header, produce))
}

fn refusal(request: &[u8]) -> Vec<u8> {
    let (header, produce) = produce(request).expect("a Produce request");
    let version = header.request_api_version;
    let topics = produce.topic_data.into_iter().map(|topic| {
        let refused = topic.partition_data.into_iter().map(|partition| {
            PartitionProduceResponse::default()
                .with_index(partition.index)
                .with_error_code(NOT_LEADER)
                .with_base_offset(-1)
        });
        TopicProduceResponse::default()
            .with_name(topic.name)
            .with_topic_id(topic.topic_id)
            .with_partition_responses(refused.collect())
    });
    let mut frame = vec![];
    let answer = ResponseHeader::default().with_correlation_id(header.correlation_id);
    answer.encode(&mut frame, ProduceResponse::header_version(version)).expect("a header");
    ProduceResponse::default().with_responses(topics.collect()).encode(&mut frame, version).expect("a response");
    frame
}
