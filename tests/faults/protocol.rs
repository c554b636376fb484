//! Kafka's own protocol, for what no client library asks: a request to one broker, and what became of it.

use kafka_protocol::{
    messages::{
        AlterPartitionReassignmentsRequest, BrokerId, DescribeQuorumRequest, ElectLeadersRequest,
        FindCoordinatorRequest, MetadataRequest, MetadataResponse, RequestHeader, ResponseHeader, TopicName,
        alter_partition_reassignments_request::{ReassignablePartition, ReassignableTopic},
        describe_quorum_request::{PartitionData, TopicData},
    },
    protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A size and so many bytes: a request or a response.
pub async fn read_frame(from: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let size = from.read_u32().await?;
    let mut frame = vec![0; size as usize];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

pub async fn write_frame(to: &mut (impl AsyncWriteExt + Unpin), frame: &[u8]) -> std::io::Result<()> {
    let size = u32::try_from(frame.len()).expect("a frame");
    to.write_all(&[&size.to_be_bytes(), frame].concat()).await
}

/// Asks the broker at this port.
async fn ask<R: Request>(port: u16, version: i16, request: &R) -> std::io::Result<R::Response> {
    let header = RequestHeader::default().with_request_api_key(R::KEY).with_request_api_version(version);
    let mut frame = vec![];
    header.encode(&mut frame, R::header_version(version)).expect("a header");
    request.encode(&mut frame, version).expect("a request");
    let mut broker = TcpStream::connect(("127.0.0.1", port)).await?;
    write_frame(&mut broker, &frame).await?;
    let answer = read_frame(&mut broker).await?;
    let mut rest = answer.as_slice();
    ResponseHeader::decode(&mut rest, R::Response::header_version(version)).expect("a header");
    Ok(R::Response::decode(&mut rest, version).expect("a response"))
}

/// Every topic's partitions, as this broker knows them.
pub async fn metadata(port: u16) -> std::io::Result<MetadataResponse> {
    ask(port, 12, &MetadataRequest::default().with_topics(None)).await
}

/// The node whose controller is the active one.
pub async fn controller(port: u16) -> std::io::Result<Option<usize>> {
    let partition = PartitionData::default().with_partition_index(0);
    let topic = TopicData::default().with_topic_name(name("__cluster_metadata")).with_partitions(vec![partition]);
    let answer = ask(port, 0, &DescribeQuorumRequest::default().with_topics(vec![topic])).await?;
    Ok(answer.topics.first().and_then(|topic| topic.partitions.first()).and_then(|quorum| node(quorum.leader_id)))
}

/// What a coordinator coordinates.
#[derive(Debug, Clone, Copy)]
pub enum Coordinated {
    Group = 0,
    Transaction = 1,
}

/// The node that coordinates the group or the transactions of this name.
pub async fn coordinator(port: u16, what: Coordinated, of: &str) -> std::io::Result<Option<usize>> {
    let request =
        FindCoordinatorRequest::default().with_key(StrBytes::from_string(of.to_owned())).with_key_type(what as i8);
    Ok(node(ask(port, 3, &request).await?.node_id))
}

/// Makes the first replica of every partition its leader again, where it is not.
pub async fn elect_preferred_leaders(port: u16) -> std::io::Result<()> {
    // Its answer names those that need no election as errors.
    ask(port, 2, &ElectLeadersRequest::default().with_topic_partitions(None).with_timeout_ms(30_000)).await?;
    Ok(())
}

/// Puts partitions on these nodes, the first of which is to lead; answers whether that has begun.
pub async fn reassign(port: u16, topic: &str, replicas: &[(i32, Vec<usize>)]) -> std::io::Result<bool> {
    let id = |&node: &usize| BrokerId(i32::try_from(node).expect("a node"));
    let partitions = replicas.iter().map(|(partition, nodes)| {
        ReassignablePartition::default()
            .with_partition_index(*partition)
            .with_replicas(Some(nodes.iter().map(id).collect()))
    });
    let topic = ReassignableTopic::default().with_name(name(topic)).with_partitions(partitions.collect());
    let request = AlterPartitionReassignmentsRequest::default().with_timeout_ms(30_000).with_topics(vec![topic]);
    let answer = ask(port, 0, &request).await?;
    let mut partitions = answer.responses.iter().flat_map(|topic| &topic.partitions);
    Ok(answer.error_code == 0 && partitions.all(|partition| partition.error_code == 0))
}

fn name(text: &str) -> TopicName {
    TopicName(StrBytes::from_string(text.to_owned()))
}

fn node(id: BrokerId) -> Option<usize> {
    usize::try_from(id.0).ok()
}
