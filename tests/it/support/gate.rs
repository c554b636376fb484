//! A way to the database that can be shut: what is sent meanwhile waits there.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

use super::{eventually, parts::PARTS};

pub struct Gate {
    pub url: String,
    shut: watch::Sender<bool>,
    waiting: Arc<AtomicUsize>,
}

impl Gate {
    pub async fn before(database: &str) -> Self {
        let options = PARTS.connect_options(database);
        let server = format!("{}:{}", options.get_host(), options.get_port());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = format!(":{}/", listener.local_addr().unwrap().port());
        let url = PARTS.database_url(database).replace(&format!(":{}/", options.get_port()), &own);
        let (shut, is_shut) = watch::channel(false);
        let waiting = Arc::new(AtomicUsize::new(0));
        let counted = waiting.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, is_shut.clone(), Some(counted.clone())));
                tokio::spawn(pass(from_server, to_client, is_shut.clone(), None));
            }
        });
        Self { url, shut, waiting }
    }

    pub fn shut(&self) {
        self.shut.send_replace(true);
    }

    pub fn open(&self) {
        self.shut.send_replace(false);
    }

    /// Until something has been sent to the database that does not get through.
    pub async fn until_somebody_waits(&self) {
        eventually("somebody waits at the gate", || async { (self.waiting.load(Ordering::SeqCst) > 0).then_some(()) })
            .await;
    }
}

async fn pass(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut shut: watch::Receiver<bool>,
    waiting: Option<Arc<AtomicUsize>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let stopped = *shut.borrow_and_update();
        let counted = waiting.as_ref().filter(|_| stopped);
        counted.inspect(|waiting| {
            waiting.fetch_add(1, Ordering::SeqCst);
        });
        let opened = shut.wait_for(|shut| !shut).await.is_ok();
        counted.inspect(|waiting| {
            waiting.fetch_sub(1, Ordering::SeqCst);
        });
        if !opened || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
