use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use secrecy::{ExposeSecret, SecretString};

use super::keys::{KeyError, public_der};

/// A new pair of keys, as PEM.
#[derive(Debug, Clone)]
pub struct PemPair {
    /// PKCS#8.
    pub private: SecretString,
    /// SubjectPublicKeyInfo.
    pub public: String,
}

/// Makes an RSA key pair of 2048, 3072, 4096 or 8192 bits. Takes up to seconds: not for async code.
pub fn generate_pair(bits: u32) -> Result<PemPair, KeyError> {
    let size = match bits {
        2048 => KeySize::Rsa2048,
        3072 => KeySize::Rsa3072,
        4096 => KeySize::Rsa4096,
        8192 => KeySize::Rsa8192,
        _ => {
            return Err(KeyError::Generate(format!("{bits} bits are not 2048, 3072, 4096 or 8192")));
        }
    };
    let pair = KeyPair::generate(size).map_err(|e| KeyError::Generate(e.to_string()))?;
    let private: Pkcs8V1Der = pair.as_der().map_err(|e| KeyError::Generate(e.to_string()))?;
    let encode = |tag, der: &[u8]| {
        pem::encode_config(&pem::Pem::new(tag, der), pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
    };
    Ok(PemPair {
        private: encode("PRIVATE KEY", private.as_ref()).into(),
        public: encode("PUBLIC KEY", public_der(&pair)?.as_ref()),
    })
}

/// Where [`write_key_files`] put the keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFiles {
    /// Variable (without `_FILE`) and path.
    pub paths: [(&'static str, PathBuf); 4],
}

impl KeyFiles {
    /// The lines for the environment that make the service use these files.
    pub fn env_lines(&self) -> String {
        self.paths.iter().map(|(name, path)| format!("{name}_FILE={}\n", path.display())).collect()
    }
}

/// Makes both pairs and writes them to `dir`, the private ones readable by their owner only.
/// A file that is there is never overwritten: with it would go every token it signed.
pub fn write_key_files(dir: &Path, bits: u32) -> io::Result<KeyFiles> {
    let files = KeyFiles {
        paths: [
            ("ACCESS_TOKEN_PRIVATE_KEY", dir.join("access_private.pem")),
            ("ACCESS_TOKEN_PUBLIC_KEY", dir.join("access_public.pem")),
            ("REFRESH_TOKEN_PRIVATE_KEY", dir.join("refresh_private.pem")),
            ("REFRESH_TOKEN_PUBLIC_KEY", dir.join("refresh_public.pem")),
        ],
    };
    if let Some((_, taken)) = files.paths.iter().find(|(_, path)| path.exists()) {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} is there already and is not overwritten. Choose another folder", taken.display()),
        ));
    }
    std::fs::create_dir_all(dir)?;
    let make = || generate_pair(bits).map_err(io::Error::other);
    let (access, refresh) = (make()?, make()?);
    let contents = [access.private.expose_secret(), &access.public, refresh.private.expose_secret(), &refresh.public];
    for ((name, path), text) in files.paths.iter().zip(contents) {
        let mode = if name.ends_with("PRIVATE_KEY") { 0o600 } else { 0o644 };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
    }
    Ok(files)
}
